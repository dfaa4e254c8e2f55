"""Pure mathematics: tensors in, tensors out.

Nothing in here knows layers, models or optimizers. One convention holds throughout:

* Weight matrices have the Keras orientation `[d_in, d_out]`.
* The curvature block of a weight matrix is `A ⊗ G`, with the *input factor* `A` of shape
  `[..., d_in, d_in]` and the *output factor* `G` of shape `[..., d_out, d_out]`; the
  preconditioned gradient is `A⁻¹ ∇W G⁻¹`.
* Leading dimensions `...` batch independent blocks (the groups of a grouped convolution).
* Layer inputs and output gradients come as *rows*: `[..., batch, positions, features]`, where
  `positions` are the places at which a layer shares its weights (1 for a plain `Dense`, the
  output pixels for a convolution).
"""
