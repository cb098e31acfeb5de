// Transforms of padded maps of which the padded transform is never whole, one walk through memory for each axis: see axes.py.
// Compile with P (padded size, even), COLUMNS (x that a block of `to_y` .. `from_y` has), LINES (z, y that one of `to_x`, `from_x`
// has), THREADS, and WIDE: positions in the row table are 64-bit.
#include "passes.cuh"
#ifndef WIDE
#define WIDE 0
#endif
#if WIDE
typedef long long Position;
#else
typedef int Position;
#endif
#ifndef ON_CPU
extern __shared__ float2 shared_lines[];
#endif
constexpr int HALF = P / 2, PITCH = LINES + 1;  // no two threads in a bank, whether they go along a line or across lines

// Where number n of a padded axis lies in a map of `box`: outside, if that is not below `box`.
__device__ __forceinline__ unsigned in_map(int n, int box) {
    const int at = n + box / 2;
    return at >= P ? at - P : at;
}

struct Table {  // of rows: voxel (z, y, x) of the packed volume
    const Position *start;
    int half;
    __device__ __forceinline__ long long at(int z, int y, int x) const {
        return start[(long long)(z + half) * (2 * half + 1) + y + half] + x;
    }
};

// Between the transforms along y and z: rows y of lines, plane after plane, those columns that hold anything: of plane z at
// base[z + P / 2] + y step[z + P / 2] + column, step 0: nowhere.
struct Between {
    const long long *base;
    const int *step;
    int limit2;  // squared distance of the farthest line
    __device__ __forceinline__ bool has(int z, int x) const { return z * z + x * x <= limit2 && step[z + HALF]; }
    __device__ __forceinline__ long long at(int z, int y, int column) const {
        return base[z + HALF] + (long long)y * step[z + HALF] + column;
    }
};

// Columns of a block: blockIdx.x counts blocks from x = first, of which there are `columns` columns.
struct Column {
    int number, x, left;  // left: of the block
    bool there;
    __device__ Column(int first, int columns) {
        left = first + blockIdx.x * COLUMNS;
        number = blockIdx.x * COLUMNS + threadIdx.x % COLUMNS;
        x = first + number;
        there = number < columns;
    }
};

// cut = transform back along y of data / (max(weight + prior, floor) gain), for voxels within limit2; without weights of data as they
// are. prior, floor, gain: [last + 1]. Rows low <= y < end of the map. Grid: (columns, planes).
extern "C" __global__ void __launch_bounds__(THREADS) to_y(
    float2 *cut, const long long *base, const int *step, const float *data, const float *weight, const Position *start,
    const int *plane_z, const float *prior, const float *floor_, const float *gain, const float2 *roots, int data_step, int weight_step,
    int half, int limit2, float padding, int last, int box, int low, int end, int first, int columns) {
    const Column column(first, columns);
    const int z = plane_z[blockIdx.y], flat2 = z * z + column.x * column.x;
    if (z * z + column.left * column.left > limit2) return;
    const Table table{start, half};
    const Between between{base, step, limit2};
    const bool together = weight == data + 2 && data_step == 4 && weight_step == 4;
    transform<P, COLUMNS, COLUMNS, false, false>(
        shared_lines, roots,
        [&](int n) {
            const int y = n < HALF ? n : n - P, r2 = flat2 + y * y;
            if (r2 > limit2 || !column.there) return make_float2(0, 0);
            const long long voxel = table.at(z, y, column.x);
            float4 seen;
            if (together) seen = reinterpret_cast<const float4 *>(data)[voxel];
            else seen.x = data[voxel * data_step], seen.y = data[voxel * data_step + 1];
            if (!weight) return make_float2(seen.y, seen.x);
            if (!together) seen.z = weight[voxel * weight_step];
            const float r = fminf(sqrtf((float)r2) / padding, (float)last);
            const int shell = (int)(r + 0.5f);
            const float divisor = fmaxf(seen.z + prior[shell], floor_[(int)r]);
            const float scale = divisor > 0 ? 1 / fmaxf(divisor * gain[shell], 1e-30f) : 0.0f;
            return make_float2(seen.y * scale, seen.x * scale);
        },
        [&](int n, float2 value) {
            const unsigned y = in_map(n, box);
            if (y < (unsigned)low || y >= (unsigned)end || !column.there || !between.has(z, column.x)) return;
            cut[between.at(z, y - low, column.number)] = swapped(value);
        });
}

// half[z, y, x] = transform back along z of cut. half: [box, rows, pitch]. Grid: (columns, rows y).
extern "C" __global__ void __launch_bounds__(THREADS) to_z(
    float2 *half_ZYX, const float2 *cut, const long long *base, const int *step, const float2 *roots, int limit2, int box, int pitch,
    int first, int columns) {
    const Column column(first, columns);
    const Between between{base, step, limit2};
    const int y = blockIdx.y, rows = gridDim.y;
    transform<P, COLUMNS, COLUMNS, false, false>(
        shared_lines, roots,
        [&](int n) {
            const int z = n < HALF ? n : n - P;
            if (!column.there || !between.has(z, column.x)) return make_float2(0, 0);
            return swapped(cut[between.at(z, y, column.number)]);
        },
        [&](int n, float2 value) {
            const unsigned z = in_map(n, box);
            if (z >= (unsigned)box || !column.there) return;
            half_ZYX[((long long)z * rows + y) * pitch + column.x] = swapped(value);
        });
}

// map[line, x] = scale times the real transform back along x of half[line], in which columns 0 .. columns - 1 hold anything.
extern "C" __global__ void __launch_bounds__(THREADS) to_x(
    float *map, const float2 *half_LX, const float2 *roots, int lines, int box, int pitch, int columns, float scale) {
    const int first = blockIdx.x * LINES;
    for (int i = threadIdx.x; i < LINES * (HALF / 2 + 1); i += THREADS) {
        const int l = i / (HALF / 2 + 1), k = i % (HALF / 2 + 1), other = HALF - k;
        const float2 *line = half_LX + (long long)(first + l) * pitch, none = make_float2(0, 0);
        const bool there = first + l < lines;
        float2 a = there && k < columns ? line[k] : none, b = there && other < columns ? line[other] : none;
        if (k == 0) a.y = 0, b.y = 0;
        const float2 even = a + conj(b), odd = (a - conj(b)) * conj(roots[k]);
        shared_lines[k * PITCH + l] = swapped(even + times_i(odd));
        if (k > 0 && other > k) shared_lines[other * PITCH + l] = swapped(conj(even) + times_i(conj(odd)));
    }
    __syncthreads();
    const auto none = [](int) { return make_float2(0, 0); };
    transform<HALF, LINES, PITCH, true, true>(shared_lines, roots, none, [](int, float2) {});
    for (int i = threadIdx.x; i < LINES * box; i += THREADS) {
        const int l = i / box, at = i % box, x = at - box / 2, n = x < 0 ? x + P : x;
        const float2 pair = shared_lines[place_of<HALF>(n / 2) * PITCH + l];
        if (first + l < lines) map[(long long)(first + l) * box + at] = scale * (n % 2 ? pair.x : pair.y);
    }
}

// A line along x of a part of a map, and how far from the centre of the map its voxels are.
struct Line {
    float flat2;
    int box;
    __device__ Line(int number, const long long *plane_z, int rows, int first_y, int box_) : box(box_) {
        const int y = number % rows + first_y - box / 2, z = (int)plane_z[number / rows] - box / 2;
        flat2 = (float)(z * z) + (float)(y * y);
    }
    __device__ __forceinline__ float distance(int at) const {
        const int x = at - box / 2;
        return sqrtf(flat2 + (float)(x * x));
    }
};
__device__ __forceinline__ float correction_at(float distance) {  // sinc^2(distance / P)
    const float a = distance / P;
    float sine, cosine;
    sincospif(a, &sine, &cosine);
    const float sinc = a > 0 ? sine / (3.14159265358979f * a) : 1.0f;
    return sinc * sinc;
}
__device__ __forceinline__ float inside_of(float distance, int box) {  // the sphere of a map: 1, 0, half a cosine between
    const float t = fminf(fmaxf((distance - 0.5f * box) / EDGE, 0.0f), 1.0f);
    float sine, cosine;
    sincospif(t, &sine, &cosine);
    return 0.5f + 0.5f * cosine;
}

// half[line, x < columns] = scale times the transform along x of the map over the gridding correction. Lines: (plane, row y).
extern "C" __global__ void __launch_bounds__(THREADS) from_x(
    float2 *half_LX, const float *map, const long long *plane_z, const float2 *roots, int lines, int rows, int first_y, int plane_step,
    int row_step, int box, int pitch, int columns, float scale) {
    const int first = blockIdx.x * LINES;
    for (int i = threadIdx.x; i < LINES * HALF; i += THREADS) {
        const int l = i / HALF, n = i % HALF, number = first + l;
        float2 pair = make_float2(0, 0);
        if (number < lines) {
            const float *values = map + (long long)(number / rows) * plane_step + (long long)(number % rows) * row_step;
            const Line line(number, plane_z, rows, first_y, box);
            const unsigned even = in_map(2 * n, box), odd = in_map(2 * n + 1, box);
            if (even < (unsigned)box) pair.x = values[even] / correction_at(line.distance(even));
            if (odd < (unsigned)box) pair.y = values[odd] / correction_at(line.distance(odd));
        }
        shared_lines[n * PITCH + l] = pair;
    }
    __syncthreads();
    const auto none = [](int) { return make_float2(0, 0); };
    transform<HALF, LINES, PITCH, true, true>(shared_lines, roots, none, [](int, float2) {});
    for (int i = threadIdx.x; i < LINES * columns; i += THREADS) {
        const int l = i / columns, k = i % columns;
        const float2 a = shared_lines[place_of<HALF>(k % HALF) * PITCH + l];
        const float2 b = conj(shared_lines[place_of<HALF>((HALF - k) % HALF) * PITCH + l]);
        const float2 odd = roots[k] * times_i(b - a);  // -i (a - b)
        if (first + l < lines) half_LX[(long long)(first + l) * pitch + k] = (0.5f * scale) * (a + b + odd);
    }
}

// cut = transform along z of half[z, y, x]. Grid: (columns, rows y).
extern "C" __global__ void __launch_bounds__(THREADS) from_z(
    float2 *cut, const float2 *half_ZYX, const long long *base, const int *step, const float2 *roots, int limit2, int box, int pitch,
    int first, int columns) {
    const Column column(first, columns);
    const Between between{base, step, limit2};
    const int y = blockIdx.y, rows = gridDim.y;
    transform<P, COLUMNS, COLUMNS, false, false>(
        shared_lines, roots,
        [&](int n) {
            const unsigned z = in_map(n, box);
            if (z >= (unsigned)box || !column.there) return make_float2(0, 0);
            return half_ZYX[((long long)z * rows + y) * pitch + column.x];
        },
        [&](int n, float2 value) {
            const auto put = [&](int z) {
                if (column.there && between.has(z, column.x)) cut[between.at(z, y, column.number)] = value;
            };
            put(n < HALF ? n : n - P);
            if (n == HALF) put(HALF);  // the same number
        });
}

// Packed voxels within limit2 = transform along y of cut. Grid: (columns, planes).
extern "C" __global__ void __launch_bounds__(THREADS) from_y(
    float2 *voxels, const float2 *cut, const long long *base, const int *step, const Position *start, const int *plane_z,
    const float2 *roots, int half, int limit2, int box, int first, int columns) {
    const Column column(first, columns);
    const int z = plane_z[blockIdx.y], flat2 = z * z + column.x * column.x;
    if (z * z + column.left * column.left > limit2) return;
    const Table table{start, half};
    const Between between{base, step, limit2};
    transform<P, COLUMNS, COLUMNS, false, false>(
        shared_lines, roots,
        [&](int n) {
            const unsigned y = in_map(n, box);
            if (y >= (unsigned)box || !column.there || !between.has(z, column.x)) return make_float2(0, 0);
            return cut[between.at(z, y, column.number)];
        },
        [&](int n, float2 value) {
            const auto put = [&](int y) {
                if (flat2 + y * y <= limit2 && column.there) voxels[table.at(z, y, column.x)] = value;
            };
            put(n < HALF ? n : n - P);
            if (n == HALF) put(HALF);
        });
}

// sums[block] = (sum of value times what is outside of the sphere, sum of the latter) over some lines of a part of a map.
extern "C" __global__ void __launch_bounds__(THREADS) sum_outside(
    double *sums, const float *map, const long long *plane_z, int lines, int rows, int first_y, int box) {
    double value = 0, weight = 0;
    for (int number = blockIdx.x; number < lines; number += gridDim.x) {
        const Line line(number, plane_z, rows, first_y, box);
        for (int x = threadIdx.x; x < box; x += THREADS) {
            const float outside = 1 - inside_of(line.distance(x), box);
            if (outside > 0) value += map[(long long)number * box + x] * outside, weight += outside;
        }
    }
    double *kept = reinterpret_cast<double *>(shared_lines);
    kept[threadIdx.x] = value, kept[THREADS + threadIdx.x] = weight;
    __syncthreads();
    for (int apart = THREADS / 2; apart > 0; apart /= 2) {
        if (threadIdx.x < apart) {
            kept[threadIdx.x] += kept[threadIdx.x + apart];
            kept[THREADS + threadIdx.x] += kept[THREADS + threadIdx.x + apart];
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) sums[2 * blockIdx.x] = kept[0], sums[2 * blockIdx.x + 1] = kept[THREADS];
}

// map = its sphere, blended into `mean` outside (if there is one), over the gridding correction; in place. Grid: lines.
extern "C" __global__ void __launch_bounds__(THREADS) finish(
    float *map, const float *mean, const long long *plane_z, int rows, int first_y, int box) {
    const Line line(blockIdx.x, plane_z, rows, first_y, box);
    for (int x = threadIdx.x; x < box; x += THREADS) {
        const float distance = line.distance(x), inside = mean ? inside_of(distance, box) : 1.0f;
        float *value = map + (long long)blockIdx.x * box + x;
        *value = (*value * inside + (mean ? (1 - inside) * *mean : 0.0f)) / correction_at(distance);
    }
}
