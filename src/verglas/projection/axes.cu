// Transforms of padded maps of which the padded transform is never whole, one walk through memory for each axis: see axes.py.
// Compile with P (padded size, even), BOX (of the map), FULL and HALVED (radices of the passes of lengths P and P / 2, two digits each,
// the first of FULL even); COLUMNS and WORKERS (x that a block of `to_y` .. `from_y` has, threads for each), LINES and LINE_WORKERS (the
// same of `to_x`, `from_x`), BLOCKS and LINE_BLOCKS (at a time on a processor), SUMMERS (threads of the rest), EDGE, and WIDE: positions
// in the row table are 64-bit. With KIND (what `to_y` is given, see there) it is `to_y`, without it all others.
#include "passes.cuh"
#include "reading.cuh"
#if WIDE
typedef long long Position;
#else
typedef int Position;
#endif
#ifndef ON_CPU
extern __shared__ float2 shared_lines[];
#endif
template <long long DIGITS, int... RADICES> struct Read : Read<DIGITS / 100, DIGITS % 100, RADICES...> {};
template <int... RADICES> struct Read<0, RADICES...> { using Plan = Passes<RADICES...>; };
using Full = Read<FULL>::Plan;
using Halved = Read<HALVED>::Plan;
constexpr int SOME = Full::first <= 10 ? Full::first : 8;  // voxels that a thread reads at a time
constexpr int HALF = P / 2, THREADS = COLUMNS * WORKERS, LINE_THREADS = LINES * LINE_WORKERS;
static_assert(Full::length == P && Halved::length == HALF && Full::first % 2 == 0);

// Where number n + r apart of a padded axis lies in a map: outside, if that is not below the box; r = 0 .. R - 1, n < apart = P / R.
// Where n does not matter for that, compilers know it.
template <int R> __device__ __forceinline__ unsigned in_map(int n, int r) {
    constexpr int APART = P / R, BEFORE = BOX / 2;
    if constexpr (P % R == 0 && BEFORE % APART == 0 && (BOX - BEFORE) % APART == 0) {
        if (r * APART < BOX - BEFORE) return n + r * APART + BEFORE;
        return r * APART < P - BEFORE ? BOX : n + r * APART + BEFORE - P;
    }
    const int at = n + r * APART + BEFORE;
    return at >= P ? at - P : at;
}
// Number n + r apart of a padded axis, r < R, from -P / 2 on; apart: P / R.
template <int R> __device__ __forceinline__ int signed_of(int n, int r, int apart) {
    if constexpr (R % 2 == 0) return n + (r < R / 2 ? r : r - R) * apart;
    const int at = n + r * apart;
    return at < HALF ? at : at - P;
}

// The rows of a plane z, in the table of rows: row[y] is where voxel x = 0 of row y lies among the packed ones.
__device__ __forceinline__ const Position *rows_of(const Position *start, int half, int z) {
    return start + (long long)(z + half) * (2 * half + 1) + half;
}

// Between the transforms along y and z: rows y of lines, plane after plane, those columns that hold anything: the first `count` of a
// run, at base + y step + column.
struct alignas(16) Plane {
    int base, step, count, unused;
    __device__ __forceinline__ int at(int y) const { return base + y * step; }
};

// Columns of a block: blockIdx.x counts blocks from x = first on, of which there are `columns` columns.
struct Column {
    int number, x, left, worker;  // left: of the block
    bool there;
    float2 *line;
    __device__ Column(int first, int columns) {
        left = first + blockIdx.x * COLUMNS;
        number = blockIdx.x * COLUMNS + threadIdx.x % COLUMNS;
        worker = threadIdx.x / COLUMNS;
        line = shared_lines + threadIdx.x % COLUMNS;
        x = first + number;
        there = number < columns;
    }
};

// What data are divided by, by steps of half a shell: max(weight + prior, floor) gain.
struct alignas(16) Curve { float prior, floor, gain, unused; };
enum Kind { PLAIN, TOGETHER, APART };  // data as they are; with weights beside them, re im weight 0; with weights elsewhere

#ifdef KIND
// cut = transform back along y of data / (max(weight + prior, floor) gain), for voxels within limit2, r steps curves from the centre.
// curves: [last + 1]. Rows low <= y < end of the map. Grid: (columns, planes).
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) to_y(
    float2 *cut, const Plane *planes, const float *data, const float *weight, const Position *start, const int *plane_z,
    const Curve *curves, const float2 *roots, int data_step, int weight_step, int half, int limit2, float steps, int last, int low, int end,
    int first, int columns) {
    const Column column(first, columns);
    const int z = plane_z[blockIdx.y];
    if (z * z + column.left * column.left > limit2) return;
    const int flat2 = column.there ? z * z + column.x * column.x : limit2 + 1;
    const Position *row = rows_of(start, half, z);
    const Plane plane = planes[z + HALF];
    const bool kept = column.number < plane.count;
    float2 *const to = cut + plane.at(-low) + column.number;
    const long long origin = row[0] + (long long)column.x;
    const float *const from = data + origin * data_step, *const over = KIND == APART ? weight + origin * weight_step : nullptr;
    transform<Full, WORKERS, COLUMNS>(
        column.line, column.worker, roots,
        [&](float2 (&v)[Full::first], int n, int q) {
            constexpr int R = Full::first;
            int voxel[R];  // from the row y = 0 of this column
#pragma unroll
            for (int r = 0; r < R; ++r) {
                const int y = signed_of<R>(n, r, q);
                voxel[r] = (int)((unsigned)read_if(flat2 + y * y <= limit2, row + y) - (unsigned)row[0]);
            }
#pragma unroll
            for (int begin = 0; begin < R; begin += SOME) {
                float4 seen[SOME];
#pragma unroll
                for (int i = 0; i < SOME; ++i) {
                    const int r = begin + i, y = signed_of<R>(n, r, q);
                    if (r >= R) continue;
                    const bool inside = flat2 + y * y <= limit2;
                    if (KIND == TOGETHER) {
                        seen[i] = read_if(inside, reinterpret_cast<const float4 *>(from) + voxel[r]);
                    } else {
                        const float *here = from + (long long)voxel[r] * data_step;
                        seen[i].x = read_if(inside, here), seen[i].y = read_if(inside, here + 1);
                        if (KIND == APART) seen[i].z = read_if(inside, over + (long long)voxel[r] * weight_step);
                    }
                }
#pragma unroll
                for (int i = 0; i < SOME; ++i) {
                    const int r = begin + i, y = signed_of<R>(n, r, q);
                    if (r >= R) continue;
                    float scale = 1;
                    if (KIND != PLAIN) {
                        const Curve curve = curves[min((int)(root_of((float)(flat2 + y * y)) * steps), last)];
                        const float divisor = fmaxf(seen[i].z + curve.prior, curve.floor);
                        scale = divisor > 0 ? one_over(fmaxf(divisor * curve.gain, 1e-30f)) : 0.0f;
                    }
                    v[r] = make_float2(scale * seen[i].y, scale * seen[i].x);
                }
            }
        },
        [&](float2 (&v)[Full::last], int k, int) {
            if (!kept) return;
#pragma unroll
            for (int r = 0; r < Full::last; ++r) {
                const unsigned y = in_map<Full::last>(k, r);
                if (y < (unsigned)BOX && y - low < (unsigned)(end - low)) to[y * plane.step] = swapped(v[r]);
            }
        });
}
#else
// half[z, y, x] = transform back along z of cut. half: [box, rows, pitch]. Grid: (columns, rows y).
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) to_z(
    float2 *half_ZYX, const float2 *cut, const Plane *planes, const float2 *roots, int pitch, int first, int columns) {
    const Column column(first, columns);
    const int y = blockIdx.y, rows = gridDim.y;
    const float2 *const from = cut + column.number;
    float2 *const to = half_ZYX + (long long)y * pitch + column.x;
    transform<Full, WORKERS, COLUMNS>(
        column.line, column.worker, roots,
        [&](float2 (&v)[Full::first], int n, int q) {
#pragma unroll
            for (int r = 0; r < Full::first; ++r) {
                const Plane plane = planes[signed_of<Full::first>(n, r, q) + HALF];
                v[r] = swapped(read_if(column.number < plane.count, from + plane.at(y)));
            }
        },
        [&](float2 (&v)[Full::last], int k, int q) {
            if (!column.there) return;
#pragma unroll
            for (int r = 0; r < Full::last; ++r) {
                const unsigned z = in_map<Full::last>(k, r);
                if (z < (unsigned)BOX) to[(long long)z * (rows * pitch)] = swapped(v[r]);
            }
        });
}

// cut = transform along z of half[z, y, x]. Grid: (columns, rows y).
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) from_z(
    float2 *cut, const float2 *half_ZYX, const Plane *planes, const float2 *roots, int pitch, int first, int columns) {
    const Column column(first, columns);
    const int y = blockIdx.y, rows = gridDim.y;
    const float2 *const from = half_ZYX + (long long)y * pitch + column.x;
    float2 *const to = cut + column.number;
    transform<Full, WORKERS, COLUMNS>(
        column.line, column.worker, roots,
        [&](float2 (&v)[Full::first], int n, int q) {
#pragma unroll
            for (int r = 0; r < Full::first; ++r) {
                const unsigned z = in_map<Full::first>(n, r);
                v[r] = make_float2(0, 0);
                if (z < (unsigned)BOX) v[r] = read_if(column.there, from + (long long)z * (rows * pitch));
            }
        },
        [&](float2 (&v)[Full::last], int k, int q) {
#pragma unroll
            for (int r = 0; r < Full::last; ++r) {
                const int z = signed_of<Full::last>(k, r, q);
                const Plane plane = planes[z + HALF];
                if (column.number < plane.count) to[plane.at(y)] = v[r];
                if (z != -HALF) continue;
                const Plane same = planes[P];  // z = P / 2 has the same number
                if (column.number < same.count) to[same.at(y)] = v[r];
            }
        });
}

// Packed voxels within limit2 = transform along y of cut. Grid: (columns, planes).
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) from_y(
    float2 *voxels, const float2 *cut, const Plane *planes, const Position *start, const int *plane_z, const float2 *roots, int half,
    int limit2, int first, int columns) {
    const Column column(first, columns);
    const int z = plane_z[blockIdx.y];
    if (z * z + column.left * column.left > limit2) return;
    const int flat2 = column.there ? z * z + column.x * column.x : limit2 + 1;
    const Position *row = rows_of(start, half, z);
    const Plane plane = planes[z + HALF];
    const bool kept = column.number < plane.count;
    const float2 *const from = cut + plane.base + column.number;
    transform<Full, WORKERS, COLUMNS>(
        column.line, column.worker, roots,
        [&](float2 (&v)[Full::first], int n, int q) {
#pragma unroll
            for (int r = 0; r < Full::first; ++r) {
                const unsigned y = in_map<Full::first>(n, r);
                v[r] = make_float2(0, 0);
                if (y < (unsigned)BOX) v[r] = read_if(kept, from + y * plane.step);
            }
        },
        [&](float2 (&v)[Full::last], int k, int q) {
#pragma unroll
            for (int r = 0; r < Full::last; ++r) {
                const int y = signed_of<Full::last>(k, r, q);
                if (flat2 + y * y > limit2) continue;
                voxels[(long long)row[y] + column.x] = v[r];
                if (y == -HALF) voxels[(long long)row[HALF] + column.x] = v[r];  // the same number
            }
        });
}

// A thread's line of a block along x.
struct OfLine {
    int number, worker;
    float2 *line;
    __device__ OfLine() {
        number = blockIdx.x * LINES + threadIdx.x / LINE_WORKERS;
        worker = threadIdx.x % LINE_WORKERS;
        line = shared_lines + threadIdx.x / LINE_WORKERS * Halved::room;
    }
};
constexpr bool PAIRED = BOX % 4 == 0;  // numbers 2 n, 2 n + 1 lie side by side in the map, at an even place

// map[line, x] = scale times the real transform back along x of half[line], in which columns 0 .. columns - 1 hold anything.
extern "C" __global__ void __launch_bounds__(LINE_THREADS, LINE_BLOCKS) to_x(
    float *map, const float2 *half_LX, const float2 *roots, int lines, int pitch, int columns, float scale) {
    const OfLine own;
    const bool there = own.number < lines;
    const float2 *const from = half_LX + (long long)(there ? own.number : 0) * pitch;
    float *const to = map + (long long)own.number * BOX;
    transform<Halved, LINE_WORKERS, 1>(
        own.line, own.worker, roots,
        [&](float2 (&v)[Halved::first], int n, int q) {
#pragma unroll
            for (int r = 0; r < Halved::first; ++r) {
                const int k = n + r * q, other = HALF - k;
                float2 a = read_if(k < columns, from + k), b = read_if(other < columns, from + other);
                if (k == 0) a.y = 0, b.y = 0;
                const float2 even = a + conj(b), odd = (a - conj(b)) * conj(roots[k]);
                v[r] = swapped(even + times_i(odd));
            }
        },
        [&](float2 (&v)[Halved::last], int k, int q) {
#pragma unroll
            for (int r = 0; r < Halved::last; ++r) {
                const unsigned even = in_map<Halved::last>(2 * k, r), odd = in_map<Halved::last>(2 * k + 1, r);
                const float2 pair = scale * swapped(v[r]);
                if constexpr (PAIRED) {
                    if (there && even < (unsigned)BOX) *reinterpret_cast<float2 *>(to + even) = pair;
                } else {
                    if (there && even < (unsigned)BOX) to[even] = pair.x;
                    if (there && odd < (unsigned)BOX) to[odd] = pair.y;
                }
            }
        });
}

__device__ __forceinline__ float over_correction(int r2) {  // 1 / sinc^2(r / P), sinc by its series: r < 0.9 P
    const float x = (float)r2 * (9.86960440108935862f / ((float)P * P));
    float sinc = x * 2.8114572543455206e-15f - 7.6471637318198165e-13f;  // 1 / 17!, 1 / 15!, ...
    sinc = sinc * x + 1.6059043836821613e-10f;
    sinc = sinc * x - 2.5052108385441720e-08f;
    sinc = sinc * x + 2.7557319223985893e-06f;
    sinc = sinc * x - 1.9841269841269841e-04f;
    sinc = sinc * x + 8.3333333333333333e-03f;
    sinc = sinc * x - 1.6666666666666667e-01f;
    const float over = one_over(sinc * x + 1);
    return over * over;
}

// half[line, x < columns] = scale times the transform along x of the map over the gridding correction. Lines: (plane, row y).
extern "C" __global__ void __launch_bounds__(LINE_THREADS, LINE_BLOCKS) from_x(
    float2 *half_LX, const float *map, const long long *plane_z, const float2 *roots, int lines, int rows, int first_y, int plane_step,
    int row_step, int pitch, int columns, float scale) {
    const OfLine own;
    const int number = own.number < lines ? own.number : 0, plane = number / rows, row = number % rows;
    const int y = row + first_y - BOX / 2, z = (int)plane_z[plane] - BOX / 2, flat2 = z * z + y * y;
    const float *const from = map + (long long)plane * plane_step + (long long)row * row_step;
    transform<Halved, LINE_WORKERS, 1, true>(
        own.line, own.worker, roots,
        [&](float2 (&v)[Halved::first], int n, int q) {
#pragma unroll
            for (int r = 0; r < Halved::first; ++r) {
                const unsigned even = in_map<Halved::first>(2 * n, r), odd = in_map<Halved::first>(2 * n + 1, r);
                const bool one = even < (unsigned)BOX, two = odd < (unsigned)BOX;
                const int x = (int)even - BOX / 2, next = (int)odd - BOX / 2;
                v[r] = make_float2(0, 0);
                if (PAIRED && one) v[r] = *reinterpret_cast<const float2 *>(from + even);
                if (!PAIRED) v[r] = make_float2(read_if(one, from + even), read_if(two, from + odd));
                if (!PAIRED || one) v[r].x *= over_correction(one ? flat2 + x * x : 0);
                if (!PAIRED || one) v[r].y *= over_correction(two ? flat2 + next * next : 0);
            }
        },
        [](float2 (&)[Halved::last], int, int) {});
    for (int k = own.worker; k < columns && own.number < lines; k += LINE_WORKERS) {
        const float2 a = own.line[Halved::place(Halved::unsorted(k % HALF))];
        const float2 b = conj(own.line[Halved::place(Halved::unsorted((HALF - k) % HALF))]);
        const float2 odd = roots[k] * times_i(b - a);  // -i (a - b)
        half_LX[(long long)own.number * pitch + k] = (0.5f * scale) * (a + b + odd);
    }
}

// Voxels side by side that a thread has, and squared distances of those of a line from the centre of the map.
constexpr int WIDTH = BOX % 4 == 0 ? 4 : 1;
struct alignas(4 * WIDTH) Voxels { float value[WIDTH]; };
struct MapLine {
    int flat2;
    __device__ MapLine(int number, const long long *plane_z, int rows, int first_y) {
        const int y = number % rows + first_y - BOX / 2, z = (int)plane_z[number / rows] - BOX / 2;
        flat2 = z * z + y * y;
    }
    __device__ __forceinline__ int squared(int at) const { return flat2 + (at - BOX / 2) * (at - BOX / 2); }
};
__device__ __forceinline__ bool beyond(int r2) { return 4 * r2 > BOX * BOX; }
__device__ __forceinline__ float outside_of(int r2) {  // the sphere of a map: 0, 1, half a cosine between
    if (r2 >= (0.5f * BOX + EDGE) * (0.5f * BOX + EDGE)) return 1;
    const float t = fminf(fmaxf((sqrtf((float)r2) - 0.5f * BOX) / EDGE, 0.0f), 1.0f);
    float sine, cosine;
    sincospif(t, &sine, &cosine);
    return 0.5f - 0.5f * cosine;
}

// sums[block] = (sum of value times what is outside of the sphere, sum of the latter) over `lines` lines of a part of a map.
extern "C" __global__ void __launch_bounds__(SUMMERS) sum_outside(
    double *sums, const float *map, const long long *plane_z, int lines, int rows, int first_y) {
    double value = 0, weight = 0;
    for (int number = blockIdx.x * (SUMMERS / 32) + threadIdx.x / 32; number < lines; number += gridDim.x * (SUMMERS / 32)) {
        const MapLine line(number, plane_z, rows, first_y);
        const Voxels *const voxels = reinterpret_cast<const Voxels *>(map + (long long)number * BOX);
#pragma unroll 4
        for (int at = threadIdx.x % 32; at < BOX / WIDTH; at += 32) {
            if (!beyond(line.squared(at * WIDTH)) && !beyond(line.squared(at * WIDTH + WIDTH - 1))) continue;
            const Voxels seen = voxels[at];
            float values = 0, weights = 0;
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) {
                const int r2 = line.squared(at * WIDTH + i);
                const float outside = beyond(r2) ? outside_of(r2) : 0.0f;
                values += seen.value[i] * outside, weights += outside;
            }
            value += values, weight += weights;
        }
    }
    double *kept = reinterpret_cast<double *>(shared_lines);
    kept[threadIdx.x] = value, kept[SUMMERS + threadIdx.x] = weight;
    __syncthreads();
    for (int apart = SUMMERS / 2; apart > 0; apart /= 2) {
        if (threadIdx.x < apart) {
            kept[threadIdx.x] += kept[threadIdx.x + apart];
            kept[SUMMERS + threadIdx.x] += kept[SUMMERS + threadIdx.x + apart];
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) sums[2 * blockIdx.x] = kept[0], sums[2 * blockIdx.x + 1] = kept[SUMMERS];
}

// map = its sphere, blended into `mean` outside (if there is one), over the gridding correction; in place.
extern "C" __global__ void __launch_bounds__(SUMMERS) finish(
    float *map, const float *mean, const long long *plane_z, int lines, int rows, int first_y) {
    const float around = mean ? *mean : 0.0f;
    for (int number = blockIdx.x * (SUMMERS / 32) + threadIdx.x / 32; number < lines; number += gridDim.x * (SUMMERS / 32)) {
        const MapLine line(number, plane_z, rows, first_y);
        Voxels *const voxels = reinterpret_cast<Voxels *>(map + (long long)number * BOX);
#pragma unroll 4
        for (int at = threadIdx.x % 32; at < BOX / WIDTH; at += 32) {
            Voxels own = voxels[at];
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) {
                const int r2 = line.squared(at * WIDTH + i);
                if (mean && beyond(r2)) {
                    const float outside = outside_of(r2);
                    own.value[i] = own.value[i] * (1 - outside) + around * outside;
                }
                own.value[i] *= over_correction(r2);
            }
            voxels[at] = own;
        }
    }
}
#endif
