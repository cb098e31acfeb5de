// Backprojection into bricks of voxels kept in shared memory. README.md says why, bricks.py calls it.
//
// A block is one warp. It owns a brick of BRICK_X x BRICK_Y x BRICK_Z cells (with the far corners one voxel more along each
// axis), walks over a range of slices and keeps the sums (re, im, weight) of the brick's voxels to itself:
//   1. 32 lanes test 32 slices: does the plane cut the brick? Those that do go to the list `hits`.
//   2. Four of them at a time, eight lattice rows of each: the interval of every row that lies in the brick, by clipping.
//      Its lattice points go to `queue`.
//   3. 32 points at a time, a lane each: position, pixel, data; the exact test whether the brick owns the point. Those it
//      owns are put down in `stage`, side by side: eight corner weights, three values, place in the brick.
//   4. One sample at a time, 24 lanes: 8 corners x (re, im, weight), so no two lanes ever meet in a word: no atomics.
// At the end the voxels that received anything are added to the packed volume, 16 bytes an atomic. With APART data and weights lie
// in arrays of their own, of which either may be missing.
//
// Every point q of the whole plane lattice is looked at, and the table says which stored pixel it is: k = q, or k = -q,
// whose data are conjugated. A point counts where p = S q has x > 0 (x >= 0 for k = q): each pixel exactly once, in one brick.

#ifdef WIDE  // positions of rows in a volume of more than 2^31 voxels
typedef long long Position;
#else
typedef int Position;
#endif

constexpr unsigned ALL = 0xffffffffu;
constexpr int STEP_Y = BRICK_X + 1, STEP_Z = STEP_Y * (BRICK_Y + 1), VOXELS = STEP_Z * (BRICK_Z + 1);
constexpr int TESTS = 4;                // slices a lane tests before hits are worked off
constexpr int PUSH = 7;                 // most points of a row queued at a time: three bits
constexpr int QUEUE = 31 + 32 * PUSH;   // 31 may be left from before
constexpr int HITS = 3 + 32 * TESTS;
constexpr int ROW = 36;                 // words of a row of `stage`: rows start 4 banks apart
constexpr float MARGIN = 2e-3f;         // voxels; planes and rows are tested this much too wide, points exactly

// Whether 8 corners x 3 sums lie in 24 different banks of shared memory if the three planes of sums are `plane` words apart.
constexpr __host__ __device__ bool no_conflict(int plane) {
    bool taken[32] = {};
    for (int part = 0; part < 3; ++part)
        for (int corner = 0; corner < 8; ++corner) {
            int place = part * plane + (corner & 1) + (corner >> 1 & 1) * STEP_Y + (corner >> 2) * STEP_Z;
            if (taken[place % 32]) return false;
            taken[place % 32] = true;
        }
    return true;
}
constexpr __host__ __device__ int plane_words() {
    for (int plane = VOXELS; plane < VOXELS + 32; ++plane)
        if (no_conflict(plane)) return plane;
    return VOXELS;
}
constexpr int PLANE = plane_words();

struct Inputs {
    const float4 *slices;  // [R] normal and x of the dual vector, then [R, 2] the lattice vectors and its y, z
    const int *table;      // [2 reach + 1, 2 reach + 1] of lattice points: k + 1, or -(k + 1) where -q is stored, or 0
    const float *data;     // [R, 2, K]; or null, as weights may be
    const float *weight;   // [R, K] or null
    int n_slices, n_pixels, reach;
    float limit2;
};

struct Brick {
    int x, y, z;      // its first cell
    float cx, cy, cz; // its centre
};

__device__ __forceinline__ float span(float x, float y, float z) {  // half the extent of a brick along a vector
    return fabsf(x) * (0.5f * BRICK_X + MARGIN) + fabsf(y) * (0.5f * BRICK_Y + MARGIN) + fabsf(z) * (0.5f * BRICK_Z + MARGIN);
}

// Normal n, lattice vectors a, b (voxels) and the vector v with v.a = 0, v.b = 1 of every slice: the row of p = x a + y b is v.p.
// (first_x, first_y), (second_x, second_y): the lattice vectors in the slice, before `sampling`.
extern "C" __global__ void slice_geometry(
    const float *sampling, float4 *slices, float first_x, float first_y, float second_x, float second_y, int n_slices) {
    const int r = blockIdx.x * blockDim.x + threadIdx.x;
    if (r >= n_slices) return;
    const float *s = sampling + 9ll * r;
    const float ax = s[0] * first_x + s[1] * first_y, bx = s[0] * second_x + s[1] * second_y;
    const float ay = s[3] * first_x + s[4] * first_y, by = s[3] * second_x + s[4] * second_y;
    const float az = s[6] * first_x + s[7] * first_y, bz = s[6] * second_x + s[7] * second_y;
    const float nx = ay * bz - az * by, ny = az * bx - ax * bz, nz = ax * by - ay * bx;
    const float area2 = nx * nx + ny * ny + nz * nz, scale = rsqrtf(area2);
    const float aa = (ax * ax + ay * ay + az * az) / area2, ab = (ax * bx + ay * by + az * bz) / area2;
    slices[r] = make_float4(nx * scale, ny * scale, nz * scale, aa * bx - ab * ax);
    slices[n_slices + 2 * r] = make_float4(ax, ay, az, aa * by - ab * ay);
    slices[n_slices + 2 * r + 1] = make_float4(bx, by, bz, aa * bz - ab * az);
}

// The part of row `ky` that may lie in the brick: first point and how many.
__device__ __forceinline__ int2 clipped_row(const Inputs &in, const Brick &brick, float4 a, float4 b, float ky) {
    float low = -in.reach, high = in.reach;
    const float centre[3] = {brick.cx, brick.cy, brick.cz}, step[3] = {a.x, a.y, a.z}, rise[3] = {b.x, b.y, b.z};
    const float half[3] = {0.5f * BRICK_X + MARGIN, 0.5f * BRICK_Y + MARGIN, 0.5f * BRICK_Z + MARGIN};
#pragma unroll
    for (int axis = 0; axis < 3; ++axis) {
        const float inverse = __fdividef(1.0f, fabsf(step[axis]) < 1e-6f ? 1e-6f : step[axis]);
        const float middle = (centre[axis] - ky * rise[axis]) * inverse, reach = half[axis] * fabsf(inverse);
        low = fmaxf(low, middle - reach);
        high = fminf(high, middle + reach);
    }
    const float first = ceilf(low), last = floorf(high);
    return make_int2((int)first, last >= first ? (int)(last - first) + 1 : 0);
}

// Step 4: add the first `count` samples of `stage`; up to three more hold zeros. What is staged is read one turn ahead.
__device__ __forceinline__ void add_staged(float *sums, const float4 *stage, int count, int lane) {
    const int corner = lane & 7, part = lane >> 3, turns = (count + 3) / 4;
    char *mine = reinterpret_cast<char *>(sums + part * PLANE + (corner & 1) + (corner >> 1 & 1) * STEP_Y + (corner >> 2) * STEP_Z);
    const float4 *weights = stage + corner * (ROW / 4), *values = stage + (8 + part) * (ROW / 4);
    const int4 *places = reinterpret_cast<const int4 *>(stage + 11 * (ROW / 4));  // in bytes
    float4 w = weights[0], v = values[0];
    int4 place = places[0];
    for (int turn = 1; turn <= turns; ++turn) {
        const float4 next_w = weights[turn], next_v = values[turn];  // ROW holds one turn more than 32 samples
        const int4 next_place = places[turn];
        if (part < 3) *reinterpret_cast<float *>(mine + place.x) += w.x * v.x;
        __syncwarp();  // the next sample may touch the same voxels through other lanes
        if (part < 3) *reinterpret_cast<float *>(mine + place.y) += w.y * v.y;
        __syncwarp();
        if (part < 3) *reinterpret_cast<float *>(mine + place.z) += w.z * v.z;
        __syncwarp();
        if (part < 3) *reinterpret_cast<float *>(mine + place.w) += w.w * v.w;
        __syncwarp();
        w = next_w, v = next_v, place = next_place;
    }
}

// Step 3 for one point a lane (slice, ky << 16 | kx), of lanes that have one. While its data are on their way the samples staged
// before are added. Returns how many are staged now.
__device__ __forceinline__ int stage_points(
    const Inputs &in, const Brick &brick, int2 point, bool real, int staged, float *sums, float4 *stage, int lane) {
    const int kx = (short)(point.y & 0xffff), ky = point.y >> 16, r = point.x;
    const int code = real ? in.table[(ky + in.reach) * (2 * in.reach + 1) + kx + in.reach] : 0;
    const float4 a = in.slices[in.n_slices + 2 * r], b = in.slices[in.n_slices + 2 * r + 1];
    const float px = a.x * kx + b.x * ky, py = a.y * kx + b.y * ky, pz = a.z * kx + b.z * ky;
    const float floor_x = floorf(px), floor_y = floorf(py), floor_z = floorf(pz);
    const int x = (int)floor_x - brick.x, y = (int)floor_y - brick.y, z = (int)floor_z - brick.z;
    const bool owned = code != 0 && px * px + py * py + pz * pz <= in.limit2 && (code > 0 ? px >= 0 : px > 0)
        && (unsigned)x < BRICK_X && (unsigned)y < BRICK_Y && (unsigned)z < BRICK_Z;
    float re = 0, im = 0, weight = 0;
    if (owned) {
        const int k = abs(code) - 1;
        const float *source = in.data + 2ll * r * in.n_pixels + k;
        if (in.data) re = source[0], im = source[in.n_pixels];
        if (in.weight) weight = in.weight[(long long)r * in.n_pixels + k];
    }
    add_staged(sums, stage, staged, lane);
    const unsigned mask = __ballot_sync(ALL, owned), below = (1u << lane) - 1;
    const int count = __popc(mask), place = owned ? __popc(mask & below) : count + __popc(~mask & below);
    const float fx = px - floor_x, fy = py - floor_y, fz = pz - floor_z;
    float *column = reinterpret_cast<float *>(stage) + place;
#pragma unroll
    for (int corner = 0; corner < 8; ++corner) {
        const float w = (corner & 1 ? fx : 1 - fx) * (corner & 2 ? fy : 1 - fy) * (corner & 4 ? fz : 1 - fz);
        column[corner * ROW] = owned ? w : 0;
    }
    column[8 * ROW] = re;
    column[9 * ROW] = code < 0 ? -im : im;
    column[10 * ROW] = weight;
    reinterpret_cast<int *>(column)[11 * ROW] = owned ? 4 * (x + y * STEP_Y + z * STEP_Z) : 0;
    __syncwarp();
    return count;
}

// The packed volume: (re, im, weight, 0) of each voxel, or with APART (re, im) and weights, either of them null.
struct Volume {
    float *data, *weight;
};

__device__ __forceinline__ void add_voxel(const Volume &to, long long voxel, float re, float im, float weight) {
#ifdef APART
    if (to.data) {
        float *target = to.data + 2 * voxel;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(target), "f"(re), "f"(im) : "memory");
#else
        atomicAdd(target, re);
        atomicAdd(target + 1, im);
#endif
    }
    if (to.weight) atomicAdd(to.weight + voxel, weight);
#else
    float *target = to.data + 4 * voxel;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(target), "f"(re), "f"(im), "f"(weight), "f"(0.0f)
                 : "memory");
#else
    atomicAdd(target, re);
    atomicAdd(target + 1, im);
    atomicAdd(target + 2, weight);
#endif
#endif
}

// Add what the brick received to the packed volume.
__device__ void flush(const Volume &to, const Position *start, int half, const Brick &brick, const float *sums, int lane) {
    for (int voxel = lane; voxel < VOXELS; voxel += 32) {
        const float re = sums[voxel], im = sums[PLANE + voxel], weight = sums[2 * PLANE + voxel];
        if (re == 0 && im == 0 && weight == 0) continue;
        const int x = brick.x + voxel % STEP_Y, y = brick.y + voxel / STEP_Y % (BRICK_Y + 1), z = brick.z + voxel / STEP_Z;
        add_voxel(to, (long long)start[(z + half) * (2 * half + 1) + y + half] + x, re, im, weight);
    }
}

// items [blocks along x]: first cell (x, y, z) of a brick and part << 16 | parts: which share of the slices is this block's.
extern "C" __global__ void __launch_bounds__(32) backproject_bricks(
    float *sums_of, float *weights_of, const Position *start, const int4 *items, const float4 *slices, const int *table, const float *data,
    const float *weight, int n_slices, int n_pixels, int reach, int half, float limit2) {
    __shared__ float sums[3 * PLANE];
    __shared__ float4 stage[12 * ROW / 4];
    __shared__ int2 queue[QUEUE];
    __shared__ int hits[HITS];
    const int lane = threadIdx.x, sub = lane & 7, group = lane >> 3;
    const unsigned below = (1u << lane) - 1;
    const Inputs in = {slices, table, data, weight, n_slices, n_pixels, reach, limit2};
    const int4 item = items[blockIdx.x];
    const Brick brick = {item.x, item.y, item.z, item.x + 0.5f * BRICK_X, item.y + 0.5f * BRICK_Y, item.z + 0.5f * BRICK_Z};
    const int parts = (item.w & 0xffff) * gridDim.y, part = blockIdx.y * (item.w & 0xffff) + (item.w >> 16);
    const int begin = (long long)n_slices * part / parts, end = (long long)n_slices * (part + 1) / parts;
    for (int word = lane; word < 3 * PLANE; word += 32) sums[word] = 0;
    int n_hits = 0, n_queue = 0, staged = 0;
    for (int first = begin; first < end; first += 32 * TESTS) {
#pragma unroll
        for (int test = 0; test < TESTS; ++test) {
            const int r = first + 32 * test + lane;
            const float4 n = in.slices[min(r, n_slices - 1)];
            const bool hit = r < end && fabsf(n.x * brick.cx + n.y * brick.cy + n.z * brick.cz) <= span(n.x, n.y, n.z);
            const unsigned mask = __ballot_sync(ALL, hit);
            if (hit) hits[n_hits + __popc(mask & below)] = r;
            n_hits += __popc(mask);
        }
        __syncwarp();
        const int fewest = first + 32 * TESTS < end ? 4 : 1;
        while (n_hits >= fewest) {
            const int taken = min(n_hits, 4);
            n_hits -= taken;
            const bool real = group < taken;
            const int r = real ? hits[n_hits + group] : 0;
            const float4 a = in.slices[n_slices + 2 * r], b = in.slices[n_slices + 2 * r + 1];
            const float vx = in.slices[r].w, middle = vx * brick.cx + a.w * brick.cy + b.w * brick.cz, extent = span(vx, a.w, b.w);
            const float last = fminf(floorf(middle + extent), in.reach);
            float ky = fmaxf(ceilf(middle - extent), -in.reach) + sub;
            for (; __any_sync(ALL, real && ky <= last); ky += 8) {
                int2 row = real && ky <= last ? clipped_row(in, brick, a, b, ky) : make_int2(0, 0);
                while (__any_sync(ALL, row.y > 0)) {
                    const int n = min(row.y, PUSH);
                    const unsigned ones = __ballot_sync(ALL, n & 1), twos = __ballot_sync(ALL, n & 2), fours = __ballot_sync(ALL, n & 4);
                    const int place = n_queue + __popc(ones & below) + 2 * __popc(twos & below) + 4 * __popc(fours & below);
#pragma unroll
                    for (int i = 0; i < PUSH; ++i)
                        if (i < n) queue[place + i] = make_int2(r, (int)ky * 65536 + ((row.x + i) & 0xffff));
                    row = make_int2(row.x + n, row.y - n);
                    n_queue += __popc(ones) + 2 * __popc(twos) + 4 * __popc(fours);
                    __syncwarp();
                    while (n_queue >= 32) {
                        n_queue -= 32;
                        staged = stage_points(in, brick, queue[n_queue + lane], true, staged, sums, stage, lane);
                    }
                    __syncwarp();
                }
            }
        }
        __syncwarp();
    }
    const int2 rest = lane < n_queue ? queue[lane] : make_int2(0, 0);
    staged = stage_points(in, brick, rest, lane < n_queue, staged, sums, stage, lane);
    add_staged(sums, stage, staged, lane);
    __syncwarp();
    flush(Volume{sums_of, weights_of}, start, half, brick, sums, lane);
}
