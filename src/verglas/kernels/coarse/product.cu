// Products of `coarse` whose scores stay in registers (Hopper: wgmma, tensor copies). README.md says what is kept of them.
//
// A block takes tiles of 128 shifted images (rows, particle after particle) x 256 orientations. One thread brings the operands
// into a ring of STAGES steps of 64 coefficients, and the bias of the next tile, while two groups of four warps multiply, 64 rows
// each. A thread then holds 2 rows x 64 columns of the tile; the lanes of a warp are 8 rows x 4 columns. CLUSTER blocks take tiles
// below each other at the same time: each brings its share of the slices, to all of them.

typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int ROWS = 128, COLUMNS = 256, STEP = 64, STAGES = 4, PARTICLES = 8, GRAIN = 64, CLUSTER = 2;
constexpr int IMAGE_BYTES = ROWS * STEP * 2, SLICE_BYTES = COLUMNS * STEP * 2, STAGE_BYTES = IMAGE_BYTES + SLICE_BYTES;
constexpr int NORM_BYTES = PARTICLES * COLUMNS * 4, PRIOR_BYTES = COLUMNS * 4, BIAS_BYTES = NORM_BYTES + PRIOR_BYTES;
constexpr int BARRIERS_AT = STAGES * STAGE_BYTES + 2 * BIAS_BYTES;
#define INFINITE __int_as_float(0x7f800000)

struct alignas(64) Map { char bytes[128]; };

struct Problem {
    const float *scale;   // of each particle's norms
    const float *offset;  // of each row: log prior of the shift, and what belongs to the particle
    float *top;           // [groups of GRAIN columns, rows]
    int *best;            // of each particle: the largest of them so far, as an integer (`ordered`)
    int rows, groups, shifts, length;
};

__device__ __forceinline__ u32 shared_address(const void *pointer) { return (u32)__cvta_generic_to_shared(pointer); }

__device__ __forceinline__ void barrier_init(u32 barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_expect(u32 barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, int phase) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}\n" ::"r"(barrier),
        "r"(phase)
        : "memory");
}

// The same barrier of another block of the cluster.
__device__ __forceinline__ void barrier_arrive_at(u32 barrier, u32 block) {
    asm volatile(
        "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\nmbarrier.arrive.shared::cluster.b64 _, [there];\n}\n" ::"r"(barrier),
        "r"(block)
        : "memory");
}

__device__ __forceinline__ void cluster_meet() {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

__device__ __forceinline__ void copy_tile(u32 to, const Map *map, u32 barrier, int column, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
        "l"((u64)map), "r"(barrier), "r"(column), "r"(row)
        : "memory");
}

// To the same place of all blocks of the cluster, counted by the same barrier of each.
__device__ __forceinline__ void copy_to_all(u32 to, const Map *map, u32 barrier, int column, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
        "l"((u64)map), "r"(barrier), "r"(column), "r"(row), "h"((unsigned short)((1 << CLUSTER) - 1))
        : "memory");
}

__device__ __forceinline__ void copy_line(u32 to, const void *from, int bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier)
                 : "memory");
}

// Rows of 128 bytes, swizzled as the tensor copy leaves them; groups of 8 rows are 1,024 bytes apart.
__device__ __forceinline__ u64 operand(u32 address) {
    return (u64)((address & 0x3FFFF) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}

#define S4(i) "+f"(s[i]), "+f"(s[i + 1]), "+f"(s[i + 2]), "+f"(s[i + 3])
#define S16(i) S4(i), S4(i + 4), S4(i + 8), S4(i + 12)
#define S64(i) S16(i), S16(i + 16), S16(i + 32), S16(i + 48)

// s = images slices^T (+ s): 64 rows x 256 columns x 16 coefficients.
__device__ __forceinline__ void multiply(float (&s)[128], u64 images, u64 slices, int add) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %130, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 {"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
        "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,"
        "%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,"
        "%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,"
        "%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127}, %128, %129, add, 1, 1, 0, 0;\n}\n"
        : S64(0), S64(64)
        : "l"(images), "l"(slices), "r"(add));
}

// Tile number -> row and column in units of tiles: `height` rows of tiles share the slices in the cache.
__device__ __forceinline__ void locate(int tile, int row_tiles, int column_tiles, int group, int &row, int &column) {
    int band = tile / (group * column_tiles) * group;
    int height = min(row_tiles - band, group);
    int within = tile - band * column_tiles;
    row = band + within % height;
    column = within / height;
}

// Largest of each of four groups over the four lanes of a quad: lane c gets that of group c.
__device__ __forceinline__ float quad_max(const float (&top)[4], int c) {
    float low = fmaxf(c & 1 ? top[1] : top[0], __shfl_xor_sync(~0u, c & 1 ? top[0] : top[1], 1));
    float high = fmaxf(c & 1 ? top[3] : top[2], __shfl_xor_sync(~0u, c & 1 ? top[2] : top[3], 1));
    return fmaxf(c & 2 ? high : low, __shfl_xor_sync(~0u, c & 2 ? low : high, 2));
}

// Integers in the order of floats; what is no number comes last.
__device__ __forceinline__ int ordered(float value) {
    int bits = value == value ? __float_as_int(value) : 0x7fffffff;
    return bits ^ (bits >> 31 & 0x7fffffff);
}

// One of the two rows that a thread has a part of.
struct Row {
    int row, b, known;
    float offset, scale;

    __device__ __forceinline__ Row(int row, const Problem &p) : row(row), b(min(row, p.rows - 1) / p.shifts) {
        offset = __ldg(p.offset + min(row, p.rows - 1)), scale = __ldg(p.scale + b), known = __ldcg(p.best + b);
    }

    // undefined: the scores of this row are no numbers.
    __device__ __forceinline__ void write(float largest, bool undefined, int group, const Problem &p) const {
        if (row >= p.rows || group >= p.groups) return;
        float value = (undefined ? __int_as_float(0x7fffffff) : largest) + offset;
        p.top[(long long)group * p.rows + row] = value;
        if (ordered(value) > known) atomicMax(p.best + b, ordered(value));
    }
};

// Scores of a tile -> the largest of each row in each group of columns. bias: norms of the particles, then priors.
__device__ __forceinline__ void reduce(const float (&s)[128], const float *bias, const Row &upper, const Row &lower, int row_0, int column, const Problem &p, u32 bias_read) {
    int first_b = row_0 / p.shifts, c = threadIdx.x & 3;
    const float *upper_norm = bias + min(upper.b - first_b, PARTICLES - 1) * COLUMNS + 2 * c;
    const float *lower_norm = bias + min(lower.b - first_b, PARTICLES - 1) * COLUMNS + 2 * c;
    const float *priors = bias + PARTICLES * COLUMNS + 2 * c;
    float upper_top[4], lower_top[4];
#pragma unroll
    for (int g = 0; g < 4; g++) {
        upper_top[g] = lower_top[g] = -INFINITE;
#pragma unroll
        for (int j = 8 * g; j < 8 * g + 8; j++) {
            float2 of_upper = *(const float2 *)(upper_norm + 8 * j), of_lower = *(const float2 *)(lower_norm + 8 * j);
            float2 prior = *(const float2 *)(priors + 8 * j);
            float first = fmaf(of_upper.x, upper.scale, s[4 * j] + prior.x), second = fmaf(of_upper.y, upper.scale, s[4 * j + 1] + prior.y);
            upper_top[g] = fmaxf(upper_top[g], fmaxf(first, second));
            first = fmaf(of_lower.x, lower.scale, s[4 * j + 2] + prior.x), second = fmaf(of_lower.y, lower.scale, s[4 * j + 3] + prior.y);
            lower_top[g] = fmaxf(lower_top[g], fmaxf(first, second));
        }
    }
    __syncwarp();
    if ((threadIdx.x & 31) == 0) barrier_arrive(bias_read);
    upper.write(quad_max(upper_top, c), s[0] != s[0], 4 * column + c, p);
    lower.write(quad_max(lower_top, c), s[2] != s[2], 4 * column + c, p);
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(384, 1) coarse_product(
    const __grid_constant__ Map images, const __grid_constant__ Map slices, const __grid_constant__ Map norm, const float *prior,
    const float *scale, const float *offset, float *top, int *best, int rows, int n_slices, int shifts, int length, int group) {
    extern __shared__ __align__(1024) char memory[];
    const Problem p = {scale, offset, top, best, rows, (n_slices + GRAIN - 1) / GRAIN, shifts, length};
    u32 stages = shared_address(memory), biases = stages + STAGES * STAGE_BYTES, barriers = stages + BARRIERS_AT;
    u32 full = barriers, empty = full + 8 * STAGES, bias_full = empty + 8 * STAGES, bias_empty = bias_full + 16;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) barrier_init(full + 8 * i, 1), barrier_init(empty + 8 * i, 2 * CLUSTER);
        for (int i = 0; i < 2; i++) barrier_init(bias_full + 8 * i, 1), barrier_init(bias_empty + 8 * i, 8);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    cluster_meet();
    int rank = blockIdx.x % CLUSTER, first_tile = blockIdx.x / CLUSTER, programs = gridDim.x / CLUSTER;
    int row_tiles = (rows + CLUSTER * ROWS - 1) / (CLUSTER * ROWS), column_tiles = (n_slices + COLUMNS - 1) / COLUMNS;
    int tiles = row_tiles * column_tiles, steps = (length + STEP - 1) / STEP, stage = 0, phase = 0, turn = 0;
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 0)
            for (int tile = first_tile; tile < tiles; tile += programs, turn++) {
                int row, column, half = turn & 1;
                locate(tile, row_tiles, column_tiles, group, row, column);
                int row_0 = (row * CLUSTER + rank) * ROWS;
                barrier_wait(bias_empty + 8 * half, ((turn >> 1) & 1) ^ 1);
                barrier_expect(bias_full + 8 * half, BIAS_BYTES);
                copy_tile(biases + half * BIAS_BYTES, &norm, bias_full + 8 * half, column * COLUMNS, row_0 / shifts);
                copy_line(biases + half * BIAS_BYTES + NORM_BYTES, prior + column * COLUMNS, PRIOR_BYTES, bias_full + 8 * half);
                for (int step = 0; step < steps; step++) {
                    barrier_wait(empty + 8 * stage, phase ^ 1);
                    barrier_expect(full + 8 * stage, STAGE_BYTES);
                    u32 to = stages + stage * STAGE_BYTES, share = rank * (SLICE_BYTES / CLUSTER);
                    copy_tile(to, &images, full + 8 * stage, step * STEP, row_0);
                    copy_to_all(to + IMAGE_BYTES + share, &slices, full + 8 * stage, step * STEP, column * COLUMNS + rank * (COLUMNS / CLUSTER));
                    if (++stage == STAGES) stage = 0, phase ^= 1;
                }
            }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        int which = threadIdx.x / 128 - 1, line = which * 64 + (threadIdx.x & 127) / 32 * 16 + (threadIdx.x & 31) / 4;
        u32 speaker = threadIdx.x & 127;  // the first threads of a group of warps tell one block each that a stage is read
        float s[128];
        for (int tile = first_tile; tile < tiles; tile += programs, turn++) {
            int row, column, half = turn & 1, last = -1;
            locate(tile, row_tiles, column_tiles, group, row, column);
            int row_0 = (row * CLUSTER + rank) * ROWS;
            auto take = [&](int count) {  // the next step's products, of 16 coefficients each; the stage before it is free then
                barrier_wait(full + 8 * stage, phase);
                u32 from = stages + stage * STAGE_BYTES + which * 64 * STEP * 2, with = stages + stage * STAGE_BYTES + IMAGE_BYTES;
                asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
                for (int k = 0; k < STEP / 16; k++)
                    if (k < count) multiply(s, operand(from + 32 * k), operand(with + 32 * k), last >= 0 || k > 0);
                asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
                asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
                if (speaker < CLUSTER && last >= 0) barrier_arrive_at(empty + 8 * last, speaker);
                last = stage;
                if (++stage == STAGES) stage = 0, phase ^= 1;
            };
            for (int step = 0; step < length / STEP; step++) take(STEP / 16);
            if (length % STEP) take((length % STEP + 15) / 16);
            Row upper(row_0 + line, p), lower(row_0 + line + 8, p);
            asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
            if (speaker < CLUSTER) barrier_arrive_at(empty + 8 * last, speaker);
            barrier_wait(bias_full + 8 * half, (turn >> 1) & 1);
            reduce(s, (const float *)(memory + STAGES * STAGE_BYTES + half * BIAS_BYTES), upper, lower, row_0, column, p, bias_empty + 8 * half);
        }
    }
    __syncwarp();
    cluster_meet();  // no block leaves while another writes to it
}
