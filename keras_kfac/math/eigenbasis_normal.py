"""Normal distributions of a matrix whose covariance is diagonal in a product of two bases.

Such is the posterior of a layer's weights whose precision is `A ⊗ G + τ I`: the eigenvectors of the
product are those of the factors, and `τ` is added to each of its eigenvalues. It is a matrix normal
distribution, `A⁻¹ ⊗ G⁻¹`, for `τ = 0` only.

Source: Ritter, Botev & Barber (2018), "A scalable Laplace approximation for neural networks"; there
the sum of the factors and roots of `τ` stands for that of the product and `τ`.
"""

from typing import Any, NamedTuple

import tensorflow as tf
import tensorflow_probability as tfp

from keras_kfac.math.linalg import is_diagonal, left_product, right_product


class EigenbasisNormal(NamedTuple):
    """`X = M + U_A (Z / √p) U_Gᵀ` with independent standard normal numbers `Z`.

    Attributes:
        mean: `M`, `[..., d_in, d_out]`; for draws a number will do.
        input_basis: `U_A`, orthogonal: `[..., d_in, d_in]`, `[d_in]` for the diagonal of one, or
            `[1, 1]` for a number.
        output_basis: `U_G`, likewise.
        precision: `p > 0`, `[..., d_in, d_out]`.
    """

    mean: tf.Tensor
    input_basis: tf.Tensor
    output_basis: tf.Tensor
    precision: tf.Tensor

    def sample(self, seed: tf.Tensor) -> tf.Tensor:
        """One draw, shaped as the precision.

        Args:
            seed: Stateless seed, int32 `[2]`.
        """
        shape, dtype = tf.shape(self.precision), self.precision.dtype
        z = tf.random.stateless_normal(shape, seed, dtype=dtype) / tf.sqrt(self.precision)
        inside = right_product(z, self.output_basis, transpose=True)
        return self.mean + left_product(self.input_basis, inside)

    def standardized(self, matrices: tf.Tensor) -> tf.Tensor:
        """`(U_Aᵀ V U_G) / √p` of matrices `V`: inner products of these are covariances.

        Args:
            matrices: `[..., d_in, d_out]` with leading axes before those of the mean.

        Example:
        >>> one, basis = tf.ones([1, 1]), tf.constant([[-1.0]])
        >>> normal = EigenbasisNormal(one, basis, basis, 4.0 * one)
        >>> normal.standardized(one).numpy().tolist()  # Its square is the variance.
        [[0.5]]
        """
        inside = right_product(matrices, self.output_basis)
        inside = left_product(self.input_basis, inside, transpose=True)
        return inside / tf.sqrt(self.precision)

    def distribution(self) -> Any:
        """The distribution of the matrix as a vector, row by row."""
        rows, columns = self.mean.shape[-2:]
        shape = [*self.mean.shape[:-2], rows * columns]
        bases = [(self.input_basis, rows), (self.output_basis, columns)]
        turn = tf.linalg.LinearOperatorKronecker([_operator(basis, size) for basis, size in bases])
        deviation = tf.math.rsqrt(tf.reshape(self.precision, shape))
        stretch = tf.linalg.LinearOperatorDiag(deviation, is_non_singular=True)
        return tfp.distributions.MultivariateNormalLinearOperator(
            tf.reshape(self.mean, shape),
            tf.linalg.LinearOperatorComposition([turn, stretch], is_non_singular=True),
        )


def _operator(basis: tf.Tensor, size: int) -> tf.linalg.LinearOperator:
    """A basis; signs of one that is diagonal do not matter."""
    if is_diagonal(basis) or basis.shape[-1] != size:
        return tf.linalg.LinearOperatorIdentity(size, dtype=basis.dtype)
    return tf.linalg.LinearOperatorFullMatrix(basis, is_non_singular=True)
