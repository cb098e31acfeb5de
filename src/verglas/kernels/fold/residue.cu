// One residue of a convolution by strides (README.md): planes z = strides m + residue of the product in real space, without a
// transform that is there whole but once: part [KEPT, SIZE, PITCH], complex. Five passes over it, each line in shared memory:
//   fold_planes     sum aliases of voxels, transform back along z      (writes)
//   back_along_rows transform back along y                             (in place)
//   multiply_lines  along x to real numbers, times the factor, and forward along x again (in place)
//   along_rows      forward along y                                    (in place)
//   unfold_planes   forward along z, add what voxels find              (reads)
// Compile with PLANES, SIZE (even; both products of 2, 3, 5, 7), PHASE (0: z, 1: y, 2: x), LINES, THREADS, BLOCKS (of a
// multiprocessor, at least), WIDE, and for z MIRROR: the plane whose numbers are the complex conjugates of plane m's,
//   0: (PLANES - m) % PLANES (of residue 0), 1: PLANES - 1 - m (of residue strides / 2): half of the planes are KEPT, and two
//   columns, real along z, are transformed as one complex line; 2: none, all are kept.
// Of row y only columns x < reach[y] hold voxels in any plane, of column x only rows |y| <= top[x]: the others are 0 before the
// transform along y, and wanted by none after it; part is neither written nor read there.
#include "lines.cuh"

#ifdef WIDE  // positions of rows in a volume of more than 2^31 voxels
typedef longlong2 Place;
#else
typedef int2 Place;
#endif
constexpr int HALF = SIZE / 2, COLUMNS = HALF + 1, PITCH = (COLUMNS + 7) / 8 * 8;  // rows begin where memory is read from
extern __shared__ float2 shared[];

constexpr int AT_ONCE = 4;  // voxels whose addresses a thread looks up before it needs the first

#if PHASE == 0
constexpr int ALIASES = SIZE / PLANES, WIDTH = MIRROR == 2 ? 1 : 2;  // columns of a line
constexpr int KEPT = MIRROR == 0 ? PLANES / 2 + 1 : MIRROR == 1 ? (PLANES + 1) / 2 : PLANES;
typedef Lines<PLANES, LINES, false> Here;
constexpr int KEPT_TURNS = (KEPT + Here::STEP - 1) / Here::STEP;
ALWAYS int mirror_of(int m) { return MIRROR == 1 ? PLANES - 1 - m : m ? PLANES - m : 0; }

ALWAYS float over(float value, float divisor, float least) {
    const float bottom = fmaxf(fabsf(divisor), least);
#ifdef __CUDA_ARCH__
    return __fdividef(value, bottom);  // off by 2 units of the last place at most, for divisors below 2^126
#else
    return value / bottom;
#endif
}

// Block = (columns, row y). place: of rows (y, z), their first voxel and how many; phase [2 half + 1] of the planes z (not read
// where there is but one residue); turns: exp(-2 pi i j / SIZE). Twice the sum, where there is a mirror.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) fold_planes(
    const float *__restrict__ values, const Place *__restrict__ place, const int *__restrict__ reach,
    const float2 *__restrict__ phase, const float2 *__restrict__ turns, float2 *__restrict__ part, int half) {
    const int row = blockIdx.y, y = row > HALF ? row - SIZE : row, within = reach[row];
    const int begin = blockIdx.x * LINES * WIDTH, x = begin + Here::line() * WIDTH;
    if (begin >= within) return;
    const Place *places = place + (long long)(y + half) * (2 * half + 1) + half;
    float2 *mine = Here::mine(shared), *line = Here::start(shared);
#pragma unroll AT_ONCE
    for (int q = 0; q < Here::TURNS; ++q) {
        const int m = Here::first() + q * Here::STEP;
        if ((q + 1) * Here::STEP > PLANES && m >= PLANES) continue;
        const int lowest = m - (half + m) / PLANES * PLANES;
        float2 sum = make_float2(0, 0);
#pragma unroll
        for (int alias = 0; alias < ALIASES; ++alias) {
            const int z = lowest + alias * PLANES;
            const Place there = places[min(z, half)];
            const float *from = values + there.x + x;
            const int count = z <= half ? (int)there.y - x : 0;
            float2 value = make_float2(0, 0);
            if (count > 0) value.x = from[0];
            if (WIDTH == 2 && count > 1) value.y = from[1];
            if (ALIASES > 1)
                sum = sum + (WIDTH == 2 ? value * phase[min(z, half) + half] : value.x * phase[min(z, half) + half]);
            else
                sum = value;
        }
        mine[q * Here::STEP * Here::GAP] = swapped(sum);
    }
    __syncthreads();
    transform<PLANES, LINES, false, SIZE>(shared, turns);
    if (x >= within) return;
    float2 *to = part + ((long long)Here::first() * SIZE + row) * PITCH + x;
#pragma unroll AT_ONCE
    for (int q = 0; q < KEPT_TURNS; ++q, to += (long long)Here::STEP * SIZE * PITCH) {
        const int m = Here::first() + q * Here::STEP;
        if ((q + 1) * Here::STEP > KEPT && m >= KEPT) continue;
        const float2 value = swapped(mine[q * Here::STEP * Here::GAP]);
        if (WIDTH == 2) {
            const float2 other = conjugate(swapped(line[mirror_of(m) * Here::GAP]));
            const float2 sum = value + other, difference = minus_i(value - other);
            *(float4 *)to = make_float4(sum.x, sum.y, difference.x, difference.y);
        } else
            *to = value;
    }
}

// fresh: what was in `out` does not count. quotient, if any: divided by |what was found, with what was in `out`|, at least `least`,
// in place of writing `out`.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) unfold_planes(
    const float2 *__restrict__ part, const Place *__restrict__ place, const int *__restrict__ reach,
    const float2 *__restrict__ phase, const float2 *__restrict__ turns, float *out, int half, int fresh, float *quotient,
    float least) {
    const int y = (int)blockIdx.y - half, row = y < 0 ? y + SIZE : y, edge = 2 * half + 1, within = reach[row];
    const int begin = blockIdx.x * LINES * WIDTH, x = begin + Here::line() * WIDTH;
    if (begin >= within) return;
    const float2 *from = part + ((long long)Here::first() * SIZE + row) * PITCH + x;
    float2 *mine = Here::mine(shared), *line = Here::start(shared);
#pragma unroll AT_ONCE
    for (int q = 0; q < KEPT_TURNS; ++q, from += (long long)Here::STEP * SIZE * PITCH) {
        const int m = Here::first() + q * Here::STEP;
        if ((q + 1) * Here::STEP > KEPT && m >= KEPT) continue;
        if (WIDTH == 2) {
            float4 both = make_float4(0, 0, 0, 0);
            if (x < within) both = *(const float4 *)from;
            if (x + 1 >= within) both.z = both.w = 0;
            line[mirror_of(m) * Here::GAP] = make_float2(both.x + both.w, both.z - both.y);
            mine[q * Here::STEP * Here::GAP] = make_float2(both.x - both.w, both.z + both.y);
        } else
            mine[q * Here::STEP * Here::GAP] = x < within ? *from : make_float2(0, 0);
    }
    __syncthreads();
    transform<PLANES, LINES, false, SIZE>(shared, turns);
    const Place *places = place + (long long)(y + half) * edge;
    for (int first = Here::first(); first < edge; first += AT_ONCE * Here::STEP) {
        long long target[AT_ONCE];
        float2 before[AT_ONCE], divided[AT_ONCE];
        int count[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            const int plane = first + i * Here::STEP;
            const Place there = places[min(plane, edge - 1)];
            target[i] = there.x + x, count[i] = plane < edge ? (int)there.y - x : 0;
            before[i] = divided[i] = make_float2(0, 0);
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            if (!fresh && count[i] > 0) before[i].x = out[target[i]];
            if (!fresh && WIDTH == 2 && count[i] > 1) before[i].y = out[target[i] + 1];
            if (quotient && count[i] > 0) divided[i].x = quotient[target[i]];
            if (quotient && WIDTH == 2 && count[i] > 1) divided[i].y = quotient[target[i] + 1];
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            if (count[i] <= 0) continue;
            const int plane = first + i * Here::STEP, z = plane - half;
            const int m = ALIASES == 1 ? (z < 0 ? z + PLANES : z) : (plane - half % PLANES + PLANES) % PLANES;
            const float2 found = line[m * Here::GAP], turned = phase[plane];
            float2 total = make_float2(
                before[i].x + turned.x * found.x + turned.y * found.y, before[i].y + turned.x * found.y - turned.y * found.x);
            if (quotient)
                total = make_float2(over(divided[i].x, total.x, least), over(divided[i].y, total.y, least));
            float *to = (quotient ? quotient : out) + target[i];
            to[0] = total.x;
            if (WIDTH == 2 && count[i] > 1) to[1] = total.y;
        }
    }
}
#endif

#if PHASE == 1
// Block = (columns, plane).
template <bool BACK>
ALWAYS void rows(float2 *__restrict__ part, const int *__restrict__ top, const float2 *__restrict__ turns) {
    typedef Lines<SIZE, LINES, false> Here;
    const int x = blockIdx.x * LINES + Here::line(), all = x < COLUMNS ? SIZE : -1, some = x < COLUMNS ? top[x] : -1;
    const int read = BACK ? some : all, written = BACK ? all : some;
    float2 *column = part + ((long long)blockIdx.y * SIZE + Here::first()) * PITCH + x, *mine = Here::mine(shared);
#pragma unroll
    for (int q = 0; q < Here::TURNS; ++q) {
        const int y = Here::first() + q * Here::STEP;
        const bool there = (q + 1) * Here::STEP <= SIZE || y < SIZE;
        float2 value = make_float2(0, 0);
        if (there & ((y <= read) | (y >= SIZE - read))) value = column[q * Here::STEP * PITCH];
        if (there) mine[q * Here::STEP * Here::GAP] = BACK ? swapped(value) : value;
    }
    __syncthreads();
    transform<SIZE, LINES, false, SIZE>(shared, turns);
#pragma unroll
    for (int q = 0; q < Here::TURNS; ++q) {
        const int y = Here::first() + q * Here::STEP;
        const bool there = (q + 1) * Here::STEP <= SIZE || y < SIZE;
        if (there & ((y <= written) | (y >= SIZE - written))) {
            const float2 value = mine[q * Here::STEP * Here::GAP];
            column[q * Here::STEP * PITCH] = BACK ? swapped(value) : value;
        }
    }
}
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) back_along_rows(
    float2 *__restrict__ part, const int *__restrict__ top, const float2 *__restrict__ turns) {
    rows<true>(part, top, turns);
}
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) along_rows(
    float2 *__restrict__ part, const int *__restrict__ top, const float2 *__restrict__ turns) {
    rows<false>(part, top, turns);
}
#endif

#if PHASE == 2
ALWAYS float root(float value) {
#ifdef __CUDA_ARCH__
    float found;
    asm("sqrt.approx.f32 %0, %1;" : "=f"(found) : "f"(value));
    return found;
#else
    return sqrtf(value);
#endif
}

// Block = (LINES rows, plane). table: the factor at i / per_step and how much more it is at i + 1, `last` its last interval;
// distances in units of the grid. The product is twice what the factor makes of the transforms.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) multiply_lines(
    float2 *__restrict__ part, const float2 *__restrict__ table, const float2 *__restrict__ turns, float per_step, float last,
    int strides, int residue) {
    typedef Lines<HALF, LINES, true> Here;
    const int row = blockIdx.x * LINES + Here::line(), plane = strides * blockIdx.y + residue;
    const float y = per_step * (row > HALF ? row - SIZE : row), z = per_step * (plane > HALF ? plane - SIZE : plane);
    float2 *line = part + ((long long)blockIdx.y * SIZE + row) * PITCH, *mine = Here::start(shared);
    constexpr int PAIRS = HALF / 2 + 1, TURNS = (PAIRS + Here::STEP - 1) / Here::STEP;
    const bool there = SIZE % LINES == 0 || row < SIZE;
    // Numbers k and HALF - k of the transform of a line's even numbers + i odd ones, of k and HALF - k of the line's own.
#pragma unroll
    for (int q = 0; q < TURNS; ++q) {
        const int k = Here::first() + q * Here::STEP;
        if (there && k < PAIRS) {
            const float2 a = line[k], b = conjugate(line[HALF - k]), even = a + b, odd = (a - b) * conjugate(turns[k]);
            mine[k] = make_float2(even.y + odd.x, even.x - odd.y);  // swapped
            if (k) mine[HALF - k] = make_float2(odd.x - even.y, even.x + odd.y);
        }
    }
    __syncthreads();
    transform<HALF, LINES, true, SIZE>(shared, turns);
    const float r2 = y * y + z * z;
#pragma unroll 4
    for (int n = Here::first(); n < HALF; n += Here::STEP) {
        const float2 value = mine[n];  // swapped
        float factor[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int column = 2 * n + i;
            const float x = per_step * (column > HALF ? SIZE - column : column), place = fminf(root(x * x + r2), last);
            const int index = (int)place;
            const float2 here = table[index];
            factor[i] = here.x + here.y * (place - index);
        }
        mine[n] = make_float2(value.y * factor[0], value.x * factor[1]);
    }
    __syncthreads();
    transform<HALF, LINES, true, SIZE>(shared, turns);
#pragma unroll
    for (int q = 0; q < TURNS; ++q) {
        const int k = Here::first() + q * Here::STEP;
        if (there && k < PAIRS) {
            const float2 a = mine[k], b = conjugate(mine[k ? HALF - k : 0]), even = a + b, odd = (a - b) * turns[k];
            line[k] = make_float2(even.x + odd.y, even.y - odd.x);
            line[HALF - k] = make_float2(even.x - odd.y, -even.y - odd.x);
        }
    }
}
#endif
