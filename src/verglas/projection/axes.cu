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
constexpr int FIRST = radix_of(P), LAST = last_radix_of(P);  // of the passes along y and z
constexpr int HALF = P / 2, PITCH = LINES + 1;  // no two threads in a bank, whether they go along a line or across lines

// Where number n of a padded axis lies in a map of `box`: outside, if that is not below `box`.
__device__ __forceinline__ unsigned in_map(int n, int box) {
    const int at = n + box / 2;
    return at >= P ? at - P : at;
}

__device__ __forceinline__ long long if_so(bool so, long long value) { return value & -(long long)so; }  // 0 if not; no branch
__device__ __forceinline__ int signed_of(int n) { return n < HALF ? n : n - P; }

// The rows of a plane z, in the table of rows: row[y] is where voxel x = 0 of row y lies among the packed ones.
__device__ __forceinline__ const Position *rows_of(const Position *start, int half, int z) {
    return start + (long long)(z + half) * (2 * half + 1) + half;
}

// Between the transforms along y and z: rows y of lines, plane after plane, those columns that hold anything: of plane z at
// base[z + P / 2] + y step[z + P / 2] + column, step 0: nowhere.
struct Between {
    const long long *base;
    const int *step;
    int limit2;  // squared distance of the farthest line
    __device__ __forceinline__ bool has(int z, int x) const { return (z * z + x * x <= limit2) & (step[z + HALF] != 0); }
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
extern "C" __global__ void __launch_bounds__(THREADS, 1024 / THREADS) to_y(
    float2 *cut, const long long *base, const int *step, const float *data, const float *weight, const Position *start,
    const int *plane_z, const float *prior, const float *floor_, const float *gain, const float2 *roots, int data_step, int weight_step,
    int half, int limit2, float padding, int last, int box, int low, int end, int first, int columns) {
    const Column column(first, columns);
    const int z = plane_z[blockIdx.y], flat2 = z * z + column.x * column.x;
    if (z * z + column.left * column.left > limit2) return;
    const Position *row = rows_of(start, half, z);
    const Between between{base, step, limit2};
    const bool together = weight == data + 2 && data_step == 4 && weight_step == 4, kept = column.there && between.has(z, column.x);
    float2 *const to = cut + between.at(z, -low, column.number);
    const long long apart = between.step[z + HALF];
    transform<P, COLUMNS, COLUMNS, false, false>(
        shared_lines, roots,
        [&](float2 (&v)[FIRST], int n, int q) {
            constexpr int R = FIRST;
            int r2[R];
            long long voxel[R];
            float scale[R], divisor[R];
#pragma unroll
            for (int r = 0; r < R; ++r) {  // voxels that are not wanted are read as the first one
                const int y = signed_of(n + r * q);
                r2[r] = flat2 + y * y;
                const bool inside = (r2[r] <= limit2) & column.there;
                voxel[r] = if_so(inside, row[if_so(inside, y)] + (long long)column.x);
                scale[r] = inside;
            }
            if (together) {
                float4 all[R];
#pragma unroll
                for (int r = 0; r < R; ++r) all[r] = reinterpret_cast<const float4 *>(data)[voxel[r]];
#pragma unroll
                for (int r = 0; r < R; ++r) v[r] = make_float2(all[r].y, all[r].x), divisor[r] = all[r].z;
            } else {
#pragma unroll
                for (int r = 0; r < R; ++r) {
                    v[r] = make_float2(data[voxel[r] * data_step + 1], data[voxel[r] * data_step]);
                    divisor[r] = weight ? weight[voxel[r] * weight_step] : 0.0f;
                }
            }
            if (weight) {
                float gains[R];
#pragma unroll
                for (int r = 0; r < R; ++r) {
                    const float at = fminf(sqrtf((float)r2[r]) / padding, (float)last);
                    const int shell = (int)(at + 0.5f);
                    divisor[r] = fmaxf(divisor[r] + prior[shell], floor_[(int)at]), gains[r] = gain[shell];
                }
#pragma unroll
                for (int r = 0; r < R; ++r) scale[r] *= (divisor[r] > 0) / fmaxf(divisor[r] * gains[r], 1e-30f);
            }
#pragma unroll
            for (int r = 0; r < R; ++r) v[r] = scale[r] * v[r];
        },
        [&](float2 (&v)[LAST], int k, int q) {
#pragma unroll
            for (int r = 0; r < LAST; ++r) {
                const unsigned y = in_map(k + r * q, box);
                if (kept && y >= (unsigned)low && y < (unsigned)end) to[y * apart] = swapped(v[r]);
            }
        });
}

// half[z, y, x] = transform back along z of cut. half: [box, rows, pitch]. Grid: (columns, rows y).
extern "C" __global__ void __launch_bounds__(THREADS, 1024 / THREADS) to_z(
    float2 *half_ZYX, const float2 *cut, const long long *base, const int *step, const float2 *roots, int limit2, int box, int pitch,
    int first, int columns) {
    const Column column(first, columns);
    const Between between{base, step, limit2};
    const int y = blockIdx.y, rows = gridDim.y;
    transform<P, COLUMNS, COLUMNS, false, false>(
        shared_lines, roots,
        [&](float2 (&v)[FIRST], int n, int q) {
            constexpr int R = FIRST;
            long long at[R];
            float there[R];
#pragma unroll
            for (int r = 0; r < R; ++r) {
                const int z = signed_of(n + r * q);
                const bool inside = column.there & between.has(z, column.x);
                at[r] = if_so(inside, between.at(z, y, column.number)), there[r] = inside;
            }
#pragma unroll
            for (int r = 0; r < R; ++r) v[r] = *(there[r] > 0 ? cut + at[r] : roots);  // there may be no lines at all
#pragma unroll
            for (int r = 0; r < R; ++r) v[r] = there[r] > 0 ? swapped(v[r]) : make_float2(0, 0);
        },
        [&](float2 (&v)[LAST], int k, int q) {
#pragma unroll
            for (int r = 0; r < LAST; ++r) {
                const unsigned z = in_map(k + r * q, box);
                if (z < (unsigned)box && column.there) half_ZYX[((long long)z * rows + y) * pitch + column.x] = swapped(v[r]);
            }
        });
}

// map[line, x] = scale times the real transform back along x of half[line], in which columns 0 .. columns - 1 hold anything.
extern "C" __global__ void __launch_bounds__(THREADS, 1024 / THREADS) to_x(
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
    const auto none = [](int) {};
    transform<HALF, LINES, PITCH, true, true>(shared_lines, roots, none, none);
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
extern "C" __global__ void __launch_bounds__(THREADS, 1024 / THREADS) from_x(
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
    const auto none = [](int) {};
    transform<HALF, LINES, PITCH, true, true>(shared_lines, roots, none, none);
    for (int i = threadIdx.x; i < LINES * columns; i += THREADS) {
        const int l = i / columns, k = i % columns;
        const float2 a = shared_lines[place_of<HALF>(k % HALF) * PITCH + l];
        const float2 b = conj(shared_lines[place_of<HALF>((HALF - k) % HALF) * PITCH + l]);
        const float2 odd = roots[k] * times_i(b - a);  // -i (a - b)
        if (first + l < lines) half_LX[(long long)(first + l) * pitch + k] = (0.5f * scale) * (a + b + odd);
    }
}

// cut = transform along z of half[z, y, x]. Grid: (columns, rows y).
extern "C" __global__ void __launch_bounds__(THREADS, 1024 / THREADS) from_z(
    float2 *cut, const float2 *half_ZYX, const long long *base, const int *step, const float2 *roots, int limit2, int box, int pitch,
    int first, int columns) {
    const Column column(first, columns);
    const Between between{base, step, limit2};
    const int y = blockIdx.y, rows = gridDim.y;
    transform<P, COLUMNS, COLUMNS, false, false>(
        shared_lines, roots,
        [&](float2 (&v)[FIRST], int n, int q) {
            constexpr int R = FIRST;
            bool inside[R];
#pragma unroll
            for (int r = 0; r < R; ++r) {
                const unsigned z = in_map(n + r * q, box);
                inside[r] = z < (unsigned)box && column.there;
                v[r] = half_ZYX[inside[r] ? ((long long)z * rows + y) * pitch + column.x : 0];
            }
#pragma unroll
            for (int r = 0; r < R; ++r) v[r] = inside[r] ? v[r] : make_float2(0, 0);
        },
        [&](float2 (&v)[LAST], int k, int q) {
            constexpr int R = LAST;
            const auto place = [&](int z) {
                return if_so(column.there & between.has(z, column.x), between.at(z, y, column.number) + 1) - 1;
            };
            long long at[R];
#pragma unroll
            for (int r = 0; r < R; ++r) at[r] = place(signed_of(k + r * q));
#pragma unroll
            for (int r = 0; r < R; ++r) {
                if (at[r] >= 0) cut[at[r]] = v[r];
                if (k + r * q == HALF && place(HALF) >= 0) cut[place(HALF)] = v[r];  // the same number
            }
        });
}

// Packed voxels within limit2 = transform along y of cut. Grid: (columns, planes).
extern "C" __global__ void __launch_bounds__(THREADS, 1024 / THREADS) from_y(
    float2 *voxels, const float2 *cut, const long long *base, const int *step, const Position *start, const int *plane_z,
    const float2 *roots, int half, int limit2, int box, int first, int columns) {
    const Column column(first, columns);
    const int z = plane_z[blockIdx.y], flat2 = z * z + column.x * column.x;
    if (z * z + column.left * column.left > limit2) return;
    const Position *row = rows_of(start, half, z);
    const Between between{base, step, limit2};
    const bool kept = column.there && between.has(z, column.x);
    const float2 *const from = cut + between.at(z, 0, column.number);
    const long long apart = between.step[z + HALF];
    transform<P, COLUMNS, COLUMNS, false, false>(
        shared_lines, roots,
        [&](float2 (&v)[FIRST], int n, int q) {
            constexpr int R = FIRST;
            bool inside[R];
#pragma unroll
            for (int r = 0; r < R; ++r) {
                const unsigned y = in_map(n + r * q, box);
                inside[r] = y < (unsigned)box && kept;
                v[r] = *(inside[r] ? from + y * apart : roots);
            }
#pragma unroll
            for (int r = 0; r < R; ++r) v[r] = inside[r] ? v[r] : make_float2(0, 0);
        },
        [&](float2 (&v)[LAST], int k, int q) {
            constexpr int R = LAST;
            long long at[R];
#pragma unroll
            for (int r = 0; r < R; ++r) {
                const int y = signed_of(k + r * q);
                const bool inside = (flat2 + y * y <= limit2) & column.there;
                at[r] = if_so(inside, row[if_so(inside, y)] + (long long)column.x + 1) - 1;
            }
#pragma unroll
            for (int r = 0; r < R; ++r) {
                if (at[r] >= 0) voxels[at[r]] = v[r];
                if (k + r * q == HALF && flat2 + HALF * HALF <= limit2 && column.there) voxels[row[HALF] + column.x] = v[r];
            }
        });
}

// sums[block] = (sum of value times what is outside of the sphere, sum of the latter) over some lines of a part of a map.
extern "C" __global__ void __launch_bounds__(THREADS, 1024 / THREADS) sum_outside(
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
extern "C" __global__ void __launch_bounds__(THREADS, 1024 / THREADS) finish(
    float *map, const float *mean, const long long *plane_z, int rows, int first_y, int box) {
    const Line line(blockIdx.x, plane_z, rows, first_y, box);
    for (int x = threadIdx.x; x < box; x += THREADS) {
        const float distance = line.distance(x), inside = mean ? inside_of(distance, box) : 1.0f;
        float *value = map + (long long)blockIdx.x * box + x;
        *value = (*value * inside + (mean ? (1 - inside) * *mean : 0.0f)) / correction_at(distance);
    }
}
