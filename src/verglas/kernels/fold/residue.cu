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

constexpr int AT_ONCE = 4;  // voxels whose addresses a thread looks up before it needs the first

#if PHASE == 0
// Block = (columns, row y). phase [2 half + 1] of the planes z; turns: exp(-2 pi i j / SIZE).
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) fold_planes(
    const float *__restrict__ values, const Position *__restrict__ start, const int *__restrict__ length,
    const float2 *__restrict__ phase, const float2 *__restrict__ turns, float2 *__restrict__ part, int half) {
    typedef Lines<PLANES, LINES, false> Here;
    constexpr int ALIASES = SIZE / PLANES;
    const int row = blockIdx.y, y = row > HALF ? row - SIZE : row, first = blockIdx.x * LINES, edge = 2 * half + 1;
    const bool empty = y < -half || y > half || first >= length[half * edge + y + half];  // the plane z = 0 has the longest rows
    if (!empty) {
        for (int item = threadIdx.x; item < PLANES * LINES; item += THREADS) {
            const int line = item % LINES, m = item / LINES, x = first + line, lowest = m - (half + m) / PLANES * PLANES;
            float2 sum = make_float2(0, 0);
#pragma unroll AT_ONCE
            for (int alias = 0; alias < ALIASES; ++alias) {
                const int z = lowest + alias * PLANES, place = (min(z, half) + half) * edge + y + half;
                const int count = length[place];
                const Position begin = start[place];
                if (z <= half && x < count) sum = sum + values[begin + x] * phase[z + half];
            }
            shared[Here::at(line, m)] = swapped(sum);
        }
        __syncthreads();
        transform<PLANES, LINES, false, SIZE>(shared, turns);
    }
    for (int item = threadIdx.x; item < PLANES * LINES; item += THREADS) {
        const int line = item % LINES, m = item / LINES, x = first + line;
        if (x < COLUMNS) part[((long long)m * SIZE + row) * PITCH + x] = empty ? make_float2(0, 0) : swapped(shared[Here::at(line, m)]);
    }
}

// fresh: what was in `out` does not count.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) unfold_planes(
    const float2 *__restrict__ part, const Position *__restrict__ start, const int *__restrict__ length,
    const float2 *__restrict__ phase, const float2 *__restrict__ turns, float *__restrict__ out, int half, int fresh) {
    typedef Lines<PLANES, LINES, false> Here;
    const int y = (int)blockIdx.y - half, row = y < 0 ? y + SIZE : y, first = blockIdx.x * LINES, edge = 2 * half + 1;
    if (first >= length[half * edge + y + half]) return;
#pragma unroll AT_ONCE
    for (int item = threadIdx.x; item < PLANES * LINES; item += THREADS) {
        const int line = item % LINES, m = item / LINES, x = first + line;
        shared[Here::at(line, m)] = x < COLUMNS ? part[((long long)m * SIZE + row) * PITCH + x] : make_float2(0, 0);
    }
    __syncthreads();
    transform<PLANES, LINES, false, SIZE>(shared, turns);
    for (int item = threadIdx.x; item < edge * LINES; item += AT_ONCE * THREADS) {
        float *target[AT_ONCE];
        float before[AT_ONCE];
        int plane[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            const int line = (item + i * THREADS) % LINES, x = first + line;
            plane[i] = (item + i * THREADS) / LINES;
            const int place = min(plane[i], edge - 1) * edge + y + half, count = length[place];
            const Position begin = start[place];
            target[i] = plane[i] < edge && x < count ? out + begin + x : nullptr;
            before[i] = 0;
        }
        if (!fresh)
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i)
                if (target[i]) before[i] = *target[i];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i)
            if (target[i]) {
                const int line = (item + i * THREADS) % LINES, m = (plane[i] - half % PLANES + PLANES) % PLANES;
                const float2 found = shared[Here::at(line, m)], turned = phase[plane[i]];
                *target[i] = before[i] + turned.x * found.x + turned.y * found.y;
            }
    }
}
#endif

#if PHASE == 1
// Block = (columns, plane). back: transforms back, else forward.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) along_rows(
    float2 *__restrict__ part, const float2 *__restrict__ turns, int back) {
    typedef Lines<SIZE, LINES, false> Here;
    const int first = blockIdx.x * LINES;
    float2 *plane = part + (long long)blockIdx.y * SIZE * PITCH;
#pragma unroll AT_ONCE
    for (int item = threadIdx.x; item < SIZE * LINES; item += THREADS) {
        const int line = item % LINES, y = item / LINES, x = first + line;
        const float2 value = x < COLUMNS ? plane[y * PITCH + x] : make_float2(0, 0);
        shared[item] = back ? swapped(value) : value;
    }
    __syncthreads();
    transform<SIZE, LINES, false, SIZE>(shared, turns);
#pragma unroll AT_ONCE
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
    float2 *__restrict__ part, const float *__restrict__ table, const float2 *__restrict__ turns, float per_step, float last,
    int strides, int residue) {
    typedef Lines<HALF, LINES, true> Here;
    const int first = blockIdx.x * LINES, plane = strides * blockIdx.y + residue, z = plane > HALF ? plane - SIZE : plane;
    float2 *lines = part + ((long long)blockIdx.y * SIZE + first) * PITCH;
    constexpr int PAIRS = HALF / 2 + 1;
#pragma unroll 2
    for (int item = threadIdx.x; item < PAIRS * LINES; item += THREADS) {
        const int line = item / PAIRS, k = item % PAIRS;
        if (first + line >= SIZE) continue;
        const float2 a = lines[line * PITCH + k], b = lines[line * PITCH + HALF - k], w = conjugate(turns[k]);
        shared[Here::at(line, k)] = swapped(packed(a, b, w));
        if (k) shared[Here::at(line, HALF - k)] = swapped(packed(b, a, make_float2(-w.x, w.y)));
    }
    __syncthreads();
    transform<HALF, LINES, true, SIZE>(shared, turns);
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
    transform<HALF, LINES, true, SIZE>(shared, turns);
#pragma unroll 2
    for (int item = threadIdx.x; item < PAIRS * LINES; item += THREADS) {
        const int line = item / PAIRS, k = item % PAIRS;
        if (first + line >= SIZE) continue;
        const float2 a = shared[Here::at(line, k)], b = shared[Here::at(line, k ? HALF - k : 0)], w = conjugate(turns[k]);
        lines[line * PITCH + k] = unpacked(a, b, w);
        lines[line * PITCH + HALF - k] = unpacked(b, a, make_float2(-w.x, w.y));
    }
}
#endif
