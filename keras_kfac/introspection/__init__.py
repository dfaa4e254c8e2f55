"""What K-FAC needs to know of Keras: layers, forward passes and losses."""
