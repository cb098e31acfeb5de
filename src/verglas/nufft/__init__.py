"""Non-uniform Fourier transforms in two and three dimensions, on CPU and GPU, with gradients.

    type 1    f[k] = sum_j c[j] exp(sign i k.x_j)        points -> modes      nufft1, Plan.type1
    type 2    c[j] = sum_k f[k] exp(sign i k.x_j)        modes -> points      nufft2, Plan.type2

Points x_j are vectors (x, y) or (x, y, z) in radians, any real numbers (the sums are periodic). Modes are
k = -(N // 2) .. (N - 1) // 2 along each axis, arrays [(Z,) Y, X]. Type 2 is the adjoint of type 1 with the other sign, to
rounding. With N voxels and frequencies in cycles per voxel, x = 2 pi frequency and the modes are the voxels: type 2 with sign -1
takes a map to its slices.

`fine` is the grid between points and modes, with the window of `window` (`axes`: on GPUs); `own` transforms on one device
by kernels/spread and FFTs, `peer` by finufft and cufinufft, `quickest` by what takes less time; `shared` (which turns its grid by
`turn`) on several ranks; `plan` chooses among them. `toeplitz` is type 1 after type 2; `direct` the definition.
"""

from verglas.nufft.plan import Plan, nufft1, nufft2
from verglas.nufft.toeplitz import Toeplitz

__all__ = ["Plan", "Toeplitz", "nufft1", "nufft2"]
