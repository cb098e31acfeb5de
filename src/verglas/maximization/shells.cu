// Sums over the shells of packed volumes, and what is done to all their voxels by shells, a warp for each row: see shells.py. WIDE: positions in the row table are 64-bit.
#ifndef WIDE
#define WIDE 0
#endif
#if WIDE
typedef long long Position;
#else
typedef int Position;
#endif
#ifndef ON_CPU
extern __shared__ double shared_sums[];
#endif
constexpr unsigned ALL = 0xffffffffu;
constexpr int AT_ONCE = 8;  // loads of a thread that are under way together

__device__ __forceinline__ int root_of(int square) {  // the largest whole number that is not beyond its root
    int root = (int)sqrtf((float)square);
    while (root * root > square) --root;
    while ((root + 1) * (root + 1) <= square) ++root;
    return root;
}

#ifdef ON_CPU
inline float root_near(float a) { return std::sqrt(a); }
#else
__device__ __forceinline__ float root_near(float a) {
    float b;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(b) : "f"(a));
    return b;
}
#endif

// Sums of a row from its begin to each place: a shell's share is the difference of two, and a row has each shell once.
struct Running {
    double *to;  // [0]: nothing, [x + 1]: up to x
    double carry;
    __device__ Running(double *to_) : to(to_), carry(0) {
        if (threadIdx.x == 0) to[0] = 0;
    }
    __device__ __forceinline__ void add(int x, double value) {
        for (int apart = 1; apart < 32; apart *= 2) {
            const double before = __shfl_up_sync(ALL, value, apart);
            if ((int)threadIdx.x >= apart) value += before;
        }
        to[x + 1] = carry + value;
        carry += __shfl_sync(ALL, value, 31);
    }
};

__device__ __forceinline__ void hand_over(double *sums, const double *own, int count) {
    __syncwarp();
    for (int i = threadIdx.x; i < count; i += 32) sums[(long long)blockIdx.x * count + i] = own[i];
}

// `shell_sums` of one kind: WEIGHED, with a prior (and what is covered is counted); GAINS: of weight / (weight + prior). Of a row a warp has
// 32 voxels at a time: those of a shell lie side by side, and are added up from lane to lane.
template <bool WEIGHED, bool GAINS> __device__ __forceinline__ void shell_sums_of(
    double *sums, const float *weight, const Position *start, const int *length, const float *prior, const int *from2, int weight_step,
    int half, int limit2, int shells, float per_voxel, float rounding) {
    double *const total = shared_sums;
    int *const voxels = reinterpret_cast<int *>(total + shells), *const covered = voxels + shells, *const begin2 = covered + shells;
    const int lane = threadIdx.x, edge = 2 * half + 1;
    for (int i = lane; i < shells; i += 32) total[i] = 0, voxels[i] = 0, covered[i] = 0;
    for (int i = lane; i <= shells; i += 32) begin2[i] = from2[i];
    __syncwarp();
    for (int row = blockIdx.x; row < edge * edge; row += gridDim.x) {
        const int z = row / edge - half, y = row % edge - half, flat2 = z * z + y * y;
        if (flat2 > limit2 || length[row] == 0) continue;
        const int count = min(length[row], root_of(limit2 - flat2) + 1);
        const float *const here = weight + (long long)start[row] * weight_step;
        for (int begin = 0; begin < count; begin += 32 * AT_ONCE) {
            float some[AT_ONCE];
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j) some[j] = here[(long long)min(begin + 32 * j + lane, count - 1) * weight_step];
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j) {
                if (begin + 32 * j >= count) break;
                const int x = begin + 32 * j + lane, r2 = flat2 + x * x;
                int s = min((int)(root_near((float)r2) * per_voxel + rounding), shells - 1);
                s -= r2 < begin2[s];  // roots are near ones
                s += r2 >= begin2[s + 1];
                if (x >= count) s = shells;  // no voxel
                const float least = WEIGHED && s < shells ? prior[s] : 0.0f;
                const unsigned over = WEIGHED ? __ballot_sync(ALL, some[j] >= least) : 0;
                float value = GAINS ? some[j] / fmaxf(some[j] + least, 1e-30f) : some[j];
                const bool last = __shfl_down_sync(ALL, s, 1) != s || lane == 31;
                const unsigned before = __ballot_sync(ALL, last) & ((1u << lane) - 1);
                const int first = 32 - __clz(before), others = lane - first;  // lane of the shell's first voxel among these
#pragma unroll
                for (int apart = 1; apart < 32; apart *= 2) {
                    const float more = __shfl_up_sync(ALL, value, apart);
                    if (others >= apart) value += more;
                }
                if (last && s < shells) {
                    total[s] += value, voxels[s] += others + 1;
                    if (WEIGHED) covered[s] += __popc(over >> first & (2u << others) - 1);
                }
                __syncwarp();
            }
        }
    }
    double *const out = sums + (long long)blockIdx.x * 3 * shells;
    for (int i = lane; i < shells; i += 32) out[i] = total[i], out[shells + i] = voxels[i], out[2 * shells + i] = covered[i];
}

// sums[block, 3, shells]: of the value, of voxels, of voxels whose weight is the prior's or more, within the radius. value: the weight,
// or weight / (weight + prior) if `gains`. prior: [shells], or none. from2: [shells + 1], squared distance from which on a voxel is of a
// shell, the last one beyond all; a shell is near r per_voxel + rounding.
extern "C" __global__ void __launch_bounds__(32) shell_sums(
    double *sums, const float *weight, const Position *start, const int *length, const float *prior, const int *from2, int weight_step,
    int half, int limit2, int shells, int gains, float per_voxel, float rounding) {
    if (!prior) shell_sums_of<false, false>(
        sums, weight, start, length, prior, from2, weight_step, half, limit2, shells, per_voxel, rounding);
    else if (gains) shell_sums_of<true, true>(
        sums, weight, start, length, prior, from2, weight_step, half, limit2, shells, per_voxel, rounding);
    else shell_sums_of<true, false>(
        sums, weight, start, length, prior, from2, weight_step, half, limit2, shells, per_voxel, rounding);
}

struct Volume {  // sums of a half-set
    const float *data, *weight;
    int data_step, weight_step;
    long long from;  // voxel that is the first one there
};

// sums[block, 3, shells] of a b, a a, b b over cells of the coarser grid with r <= shells - 1, shell by shell: a, b: data over weight
// of all voxels of a cell. begin, end: [2 small + 1], voxels along an axis that fall to each number of that grid. Cells: planes plane_u.
// first_plane_b: plane of voxels, counted from 0, that b begins with.
extern "C" __global__ void __launch_bounds__(32) fsc_sums(
    double *sums, const float *data_a, const float *weight_a, const float *data_b, const float *weight_b, const Position *start,
    const int *length, const int *plane_u, const int *begin, const int *end, int step_a, int weight_step_a, int step_b,
    int weight_step_b, int half, int planes, int small, int shells, int room, int first_plane_b) {
    double *own = shared_sums, *kept = own + 3 * shells;
    const int lane = threadIdx.x, edge = 2 * half + 1, rows = 2 * small + 1, limit2 = (shells - 1) * (shells - 1);
    const Volume both[2] = {
        {data_a, weight_a, step_a, weight_step_a, 0}, {data_b, weight_b, step_b, weight_step_b, start[first_plane_b * edge]}};
    for (int i = lane; i < 3 * shells; i += 32) own[i] = 0;
    for (int row = blockIdx.x; row < planes * rows; row += gridDim.x) {
        const int u = plane_u[row / rows], v = row % rows - small, flat2 = u * u + v * v;
        if (flat2 > limit2) continue;
        const int count = min(small, root_of(limit2 - flat2)) + 1;
        Running cross(kept), power_a(kept + room + 1), power_b(kept + 2 * (room + 1));
        for (int first = 0; first < count; first += 32) {
            const int x_u = first + lane;
            float re[2] = {0, 0}, im[2] = {0, 0}, weight[2] = {0, 0};
            if (x_u < count) {
                const int from = max(begin[small + x_u], 0);
                for (int z = begin[small + u]; z < end[small + u]; ++z)
                    for (int y = begin[small + v]; y < end[small + v]; ++y) {
                        const int table = (z + half) * edge + y + half, to = min(end[small + x_u], length[table]);
                        for (int x = from; x < to; ++x) {
                            const long long voxel = (long long)start[table] + x;
#pragma unroll
                            for (int h = 0; h < 2; ++h) {
                                const long long place = voxel - both[h].from;
                                re[h] += both[h].data[place * both[h].data_step];
                                im[h] += both[h].data[place * both[h].data_step + 1];
                                weight[h] += both[h].weight[place * both[h].weight_step];
                            }
                        }
                    }
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const float over = weight[h] > 0 ? 1 / weight[h] : 0.0f;
                    re[h] *= over, im[h] *= over;
                }
            }
            cross.add(x_u, re[0] * re[1] + im[0] * im[1]);
            power_a.add(x_u, re[0] * re[0] + im[0] * im[0]);
            power_b.add(x_u, re[1] * re[1] + im[1] * im[1]);
        }
        __syncwarp();
        // r + 1/2 >= s from r^2 >= s^2 - s + 1 on, in whole numbers.
        const auto first_of = [&](int s) {
            const int left2 = s * s - s + 1 - flat2;
            const int x = left2 > 0 ? root_of(left2) : 0;
            return left2 > 0 && x * x < left2 ? x + 1 : x;
        };
        int begin_s = root_of(flat2);
        if (flat2 >= begin_s * begin_s + begin_s + 1) ++begin_s;
        for (int s = begin_s + lane; s < shells && first_of(s) < count; s += 32) {
            const int from = s == begin_s ? 0 : first_of(s), to = min(first_of(s + 1), count);
            for (int k = 0; k < 3; ++k) own[k * shells + s] += kept[k * (room + 1) + to] - kept[k * (room + 1) + from];
        }
        __syncwarp();
    }
    hand_over(sums, own, 3 * shells);
}

// By steps of half a shell: prior, floor, gain (`Sums.curves_J4` of axes.py).
struct alignas(16) Curve { float prior, floor, gain, unused; };

// A warp's rows, one after another: each(place of the voxel, squared distance from the origin) of all their voxels.
template <class Each> __device__ __forceinline__ void walk(const Position *start, const int *length, int half, Each each) {
    const int edge = 2 * half + 1;
    for (int row = blockIdx.x; row < edge * edge; row += gridDim.x) {
        const int z = row / edge - half, y = row % edge - half, count = length[row];
        const long long begin = start[row];
#pragma unroll 4
        for (int x = threadIdx.x; x < count; x += 32) each(begin + x, z * z + y * y + x * x);
    }
}

// data /= max(weight + prior, floor) gain, 0 where that is 0, for voxels within limit2; in place.
extern "C" __global__ void __launch_bounds__(32) divide_voxels(
    float2 *data, const float *weight, const Position *start, const int *length, const Curve *curves, int half, int limit2, float steps,
    int last) {
    walk(start, length, half, [&](long long voxel, int r2) {
        if (r2 > limit2) return;
        const Curve curve = curves[min((int)(root_near((float)r2) * steps), last)];
        const float divisor = fmaxf(weight[voxel] + curve.prior, curve.floor);
        const float scale = divisor > 0 ? 1 / fmaxf(divisor * curve.gain, 1e-30f) : 0.0f;
        const float2 old = data[voxel];
        data[voxel] = make_float2(scale * old.x, scale * old.y);
    });
}

// weight += prior, but 0 beyond limit2; in place.
extern "C" __global__ void __launch_bounds__(32) add_prior(
    float *weight, const Position *start, const int *length, const Curve *curves, int half, int limit2, float steps, int last) {
    walk(start, length, half, [&](long long voxel, int r2) {
        const float prior = curves[min((int)(root_near((float)r2) * steps), last)].prior;
        weight[voxel] = r2 > limit2 ? 0.0f : weight[voxel] + prior;
    });
}

// out[voxel, 2]: data over weight of all voxels of a cell of the coarser grid (0: nothing seen), of cells with r^2 <= limit2, on a row
// table of that grid: to_start, half to_half. begin, end, small, Volume: as of fsc_sums.
extern "C" __global__ void __launch_bounds__(32) averages(
    float *out, const float *data, const float *weight, const Position *start, const int *length, const int *to_start, const int *begin,
    const int *end, int data_step, int weight_step, int half, int small, int to_half, int limit2) {
    const int lane = threadIdx.x, edge = 2 * half + 1, rows = 2 * small + 1, to_edge = 2 * to_half + 1;
    for (int row = blockIdx.x; row < rows * rows; row += gridDim.x) {
        const int u = row / rows - small, v = row % rows - small, flat2 = u * u + v * v;
        if (flat2 > limit2) continue;
        const int count = min(small, root_of(limit2 - flat2)) + 1;
        float *const here = out + 2 * (long long)to_start[(u + to_half) * to_edge + v + to_half];
        for (int x_u = lane; x_u < count; x_u += 32) {
            float re = 0, im = 0, sum = 0;
            const int from = max(begin[small + x_u], 0);
            for (int z = begin[small + u]; z < end[small + u]; ++z)
                for (int y = begin[small + v]; y < end[small + v]; ++y) {
                    const int table = (z + half) * edge + y + half, to = min(end[small + x_u], length[table]);
                    for (int x = from; x < to; ++x) {
                        const long long voxel = (long long)start[table] + x;
                        re += data[voxel * data_step], im += data[voxel * data_step + 1], sum += weight[voxel * weight_step];
                    }
                }
            const float over = sum > 0 ? 1 / sum : 0.0f;
            here[2 * x_u] = re * over, here[2 * x_u + 1] = im * over;
        }
    }
}
