// One residue of a convolution by strides (README.md): planes z = strides m + residue of the product in real space, without a
// transform that is there whole but once: part [PLANES, SIZE, PITCH], complex. Five passes over it, each line in shared memory:
//   fold_planes     sum aliases of voxels, transform back along z      (writes)
//   along_rows      transform back along y                             (in place)
//   multiply_lines  along x to real numbers, times the factor, and forward along x again (in place)
//   along_rows      forward along y                                    (in place)
//   unfold_planes   forward along z, add what voxels find              (reads)
// Compile with PLANES, SIZE (even; both products of 2, 3, 5, 7), PHASE (0: z, 1: y, 2: x), LINES, THREADS, BLOCKS (of a
// multiprocessor, at least), WIDE.
#include "lines.cuh"

#ifdef WIDE  // positions of rows in a volume of more than 2^31 voxels
typedef long long Position;
#else
typedef int Position;
#endif
constexpr int HALF = SIZE / 2, COLUMNS = HALF + 1, PITCH = (COLUMNS + 7) / 8 * 8;  // rows begin where memory is read from
extern __shared__ float2 shared[];

#if PHASE == 0
// Block = (columns, row y). phase [2 half + 1] of the planes z.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) fold_planes(
    const float *values, const Position *start, const int *length, const float2 *phase, float2 *part, int half) {
    typedef Lines<PLANES, LINES, false> Here;
    const int row = blockIdx.y, y = row > HALF ? row - SIZE : row, first = blockIdx.x * LINES, edge = 2 * half + 1;
    const bool within = y >= -half && y <= half;
    for (int item = threadIdx.x; item < PLANES * LINES; item += THREADS) {
        const int line = item % LINES, m = item / LINES, x = first + line;
        float2 sum = make_float2(0, 0);
        if (within)
            for (int z = m - (half + m) / PLANES * PLANES; z <= half; z += PLANES) {
                const int place = (z + half) * edge + y + half;
                if (x < length[place]) sum = sum + values[start[place] + x] * phase[z + half];
            }
        shared[Here::at(line, m)] = swapped(sum);
    }
    __syncthreads();
    transform<PLANES, LINES, false>(shared);
    for (int item = threadIdx.x; item < PLANES * LINES; item += THREADS) {
        const int line = item % LINES, m = item / LINES, x = first + line;
        if (x < COLUMNS) part[((long long)m * SIZE + row) * PITCH + x] = swapped(shared[Here::at(line, m)]);
    }
}

// fresh: what was in `out` does not count.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) unfold_planes(
    const float2 *part, const Position *start, const int *length, const float2 *phase, float *out, int half, int fresh) {
    typedef Lines<PLANES, LINES, false> Here;
    const int y = (int)blockIdx.y - half, row = y < 0 ? y + SIZE : y, first = blockIdx.x * LINES, edge = 2 * half + 1;
    if (first >= length[half * edge + y + half]) return;  // the plane z = 0 has the longest rows
    for (int item = threadIdx.x; item < PLANES * LINES; item += THREADS) {
        const int line = item % LINES, m = item / LINES, x = first + line;
        shared[Here::at(line, m)] = x < COLUMNS ? part[((long long)m * SIZE + row) * PITCH + x] : make_float2(0, 0);
    }
    __syncthreads();
    transform<PLANES, LINES, false>(shared);
    for (int item = threadIdx.x; item < edge * LINES; item += THREADS) {
        const int line = item % LINES, z = item / LINES - half, x = first + line, place = (z + half) * edge + y + half;
        if (x >= length[place]) continue;
        const float2 found = shared[Here::at(line, ((z % PLANES) + PLANES) % PLANES)], turned = phase[z + half];
        float *target = out + start[place] + x;
        *target = (fresh ? 0.0f : *target) + turned.x * found.x + turned.y * found.y;
    }
}
#endif

#if PHASE == 1
// Block = (columns, plane). back: transforms back, else forward.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) along_rows(float2 *part, int back) {
    typedef Lines<SIZE, LINES, false> Here;
    const int first = blockIdx.x * LINES;
    float2 *plane = part + (long long)blockIdx.y * SIZE * PITCH;
    for (int item = threadIdx.x; item < SIZE * LINES; item += THREADS) {
        const int line = item % LINES, y = item / LINES, x = first + line;
        const float2 value = x < COLUMNS ? plane[y * PITCH + x] : make_float2(0, 0);
        shared[item] = back ? swapped(value) : value;
    }
    __syncthreads();
    transform<SIZE, LINES, false>(shared);
    for (int item = threadIdx.x; item < SIZE * LINES; item += THREADS) {
        const int line = item % LINES, y = item / LINES, x = first + line;
        const float2 value = shared[item];
        if (x < COLUMNS) plane[y * PITCH + x] = back ? swapped(value) : value;
    }
}
#endif

#if PHASE == 2
// Numbers k and HALF - k of the transform of a line's even numbers + i odd ones, of k and HALF - k of the line's own.
ALWAYS float2 packed(float2 a, float2 b, float2 w) {  // a: number k, b: HALF - k; w = exp(2 pi i k / SIZE)
    const float2 even = a + conjugate(b), odd = (a - conjugate(b)) * w;
    return make_float2(even.x - odd.y, even.y + odd.x);
}
ALWAYS float2 unpacked(float2 a, float2 b, float2 w) {
    const float2 even = a + conjugate(b), odd = minus_i((a - conjugate(b)) * conjugate(w));
    return 0.5f * (even + odd);
}

// Block = (LINES rows, plane). table: the factor at i / per_step, `last` its last interval; distances in units of the grid.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) multiply_lines(
    float2 *part, const float *table, float per_step, float last, int strides, int residue) {
    typedef Lines<HALF, LINES, true> Here;
    const int first = blockIdx.x * LINES, plane = strides * blockIdx.y + residue, z = plane > HALF ? plane - SIZE : plane;
    float2 *lines = part + ((long long)blockIdx.y * SIZE + first) * PITCH;
    constexpr int PAIRS = HALF / 2 + 1;
#pragma unroll 2
    for (int item = threadIdx.x; item < PAIRS * LINES; item += THREADS) {
        const int line = item / PAIRS, k = item % PAIRS;
        if (first + line >= SIZE) continue;
        const float2 a = lines[line * PITCH + k], b = lines[line * PITCH + HALF - k], w = turn(2.0f * k / SIZE);
        shared[Here::at(line, k)] = swapped(packed(a, b, w));
        if (k) shared[Here::at(line, HALF - k)] = swapped(packed(b, a, make_float2(-w.x, w.y)));
    }
    __syncthreads();
    transform<HALF, LINES, true>(shared);
#pragma unroll 2
    for (int item = threadIdx.x; item < HALF * LINES; item += THREADS) {
        const int line = item / HALF, n = item % HALF, row = first + line, y = row > HALF ? row - SIZE : row;
        const float2 value = swapped(shared[Here::at(line, n)]);
        float factor[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int column = 2 * n + i;
            const float x = column > HALF ? column - SIZE : column;
            const float place = fminf(sqrtf(x * x + ((float)y * y + (float)z * z)) * per_step, last);
            const int index = (int)place;
            factor[i] = table[index] + (table[index + 1] - table[index]) * (place - index);
        }
        shared[Here::at(line, n)] = make_float2(value.x * factor[0], value.y * factor[1]);
    }
    __syncthreads();
    transform<HALF, LINES, true>(shared);
#pragma unroll 2
    for (int item = threadIdx.x; item < PAIRS * LINES; item += THREADS) {
        const int line = item / PAIRS, k = item % PAIRS;
        if (first + line >= SIZE) continue;
        const float2 a = shared[Here::at(line, k)], b = shared[Here::at(line, k ? HALF - k : 0)], w = turn(2.0f * k / SIZE);
        lines[line * PITCH + k] = unpacked(a, b, w);
        lines[line * PITCH + HALF - k] = unpacked(b, a, make_float2(-w.x, w.y));
    }
}
#endif
