// Transforms between a grid and its modes along the slower axes, one kernel each way: see axes.py. A block has COLUMNS lines side by
// side, of one row; it reads what there is of each once and writes what is kept of it once. Compile with P (cells of a line, even),
// PASSES (their radices, two digits each), COLUMNS, THREADS.
#include "../projection/passes.cuh"
#ifndef ON_CPU
extern __shared__ float2 shared_lines[];
#endif
template <long long DIGITS, int... RADICES> struct Read : Read<DIGITS / 100, DIGITS % 100, RADICES...> {};
template <int... RADICES> struct Read<0, RADICES...> { using Plan = Passes<RADICES...>; };
using Lines = Read<PASSES>::Plan;
constexpr int FIRST = Lines::first, LAST = Lines::last, WORKERS = THREADS / COLUMNS;
static_assert(Lines::length == P);

// Which mode, counted from the lowest, place n of a transform of `cells` holds: none, if that is not below `modes`.
__device__ __forceinline__ unsigned mode_of(int n, int cells, int modes) {
    const int at = n + modes / 2;
    return at >= cells ? at - cells : at;
}
__device__ __forceinline__ float2 either(float2 a, int backward) { return backward ? swapped(a) : a; }

// to[mode] = factor[mode] from^(mode) along lines of P cells, `apart` apart, of rows `step` apart. A row has x cells side by side, of
// which the x_kept modes are kept and multiplied by factor_x, if there is one. From one vector to the next: `next`. Grid: (columns, rows x
// vectors).
extern "C" __global__ void __launch_bounds__(THREADS) to_modes(
    float2 *to, const float2 *from, const float2 *roots, const float *factor, const float *factor_x, int rows, int from_step, int from_apart,
    int to_step, int to_apart, int x, int x_kept, int modes, int backward) {
    const int mode_x = blockIdx.x * COLUMNS + threadIdx.x % COLUMNS, row = blockIdx.y % rows, vector = blockIdx.y / rows;
    const bool there = mode_x < x_kept;
    const int low = mode_x - x_kept / 2, cell_x = !there ? 0 : x == x_kept ? mode_x : low < 0 ? low + x : low;
    const float2 *const source = from + (long long)vector * P * rows * x + (long long)row * from_step + cell_x;
    float2 *const target = to + (long long)vector * modes * rows * x_kept + (long long)row * to_step + mode_x;
    const float scale = there && factor_x ? factor_x[mode_x] : 1.0f;
    transform<Lines, WORKERS, COLUMNS>(
        shared_lines + threadIdx.x % COLUMNS, threadIdx.x / COLUMNS, roots,
        [&](float2 (&v)[FIRST], int n, int q) {
#pragma unroll
            for (int r = 0; r < FIRST; ++r) v[r] = source[(long long)(n + r * q) * from_apart];
#pragma unroll
            for (int r = 0; r < FIRST; ++r) v[r] = either(v[r], backward);
        },
        [&](float2 (&v)[LAST], int k, int q) {
#pragma unroll
            for (int r = 0; r < LAST; ++r) {
                const unsigned mode = mode_of(k + r * q, P, modes);
                if (there && mode < (unsigned)modes) target[(long long)mode * to_apart] = (scale * factor[mode]) * either(v[r], backward);
            }
        });
}

// The transpose: to[cell] = the transform of factor[mode] from[mode]. A row has x_kept modes side by side, which come to lie among x
// cells, 0 between them.
extern "C" __global__ void __launch_bounds__(THREADS) to_cells(
    float2 *to, const float2 *from, const float2 *roots, const float *factor, const float *factor_x, int rows, int from_step, int from_apart,
    int to_step, int to_apart, int x, int x_kept, int modes, int backward) {
    const int cell_x = blockIdx.x * COLUMNS + threadIdx.x % COLUMNS, row = blockIdx.y % rows, vector = blockIdx.y / rows;
    const unsigned mode_x = x == x_kept ? cell_x : mode_of(cell_x, x, x_kept);
    const bool there = cell_x < x, holds = there && mode_x < (unsigned)x_kept;
    const float2 *const source = from + (long long)vector * modes * rows * x_kept + (long long)row * from_step + (holds ? mode_x : 0);
    float2 *const target = to + (long long)vector * P * rows * x + (long long)row * to_step + cell_x;
    const float scale = !holds ? 0.0f : factor_x ? factor_x[mode_x] : 1.0f;
    transform<Lines, WORKERS, COLUMNS>(
        shared_lines + threadIdx.x % COLUMNS, threadIdx.x / COLUMNS, roots,
        [&](float2 (&v)[FIRST], int n, int q) {
            float f[FIRST];
#pragma unroll
            for (int r = 0; r < FIRST; ++r) {
                const unsigned mode = mode_of(n + r * q, P, modes);
                const bool held = mode < (unsigned)modes && holds;
                f[r] = held ? scale * factor[mode] : 0.0f;
                v[r] = source[held ? (long long)mode * from_apart : 0];
            }
#pragma unroll
            for (int r = 0; r < FIRST; ++r) v[r] = f[r] != 0 ? f[r] * either(v[r], backward) : make_float2(0, 0);
        },
        [&](float2 (&v)[LAST], int k, int q) {
#pragma unroll
            for (int r = 0; r < LAST; ++r)
                if (there) target[(long long)(k + r * q) * to_apart] = either(v[r], backward);
        });
}
