// Products of `coarse` whose scores stay in registers (Hopper: wgmma, tensor copies). README.md says what is kept of them.
//
// A block takes tiles of 128 shifted images (rows, particle after particle) x 256 orientations. One thread brings the operands
// into a ring of STAGES steps of 64 coefficients, and the bias of the next tile, while two groups of four warps multiply, 64 rows
// each. A thread then holds 2 rows x 64 columns of the tile; the lanes of a warp are 8 rows x 4 columns.

typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int ROWS = 128, COLUMNS = 256, STEP = 64, STAGES = 4, PARTICLES = 8;
constexpr int IMAGE_BYTES = ROWS * STEP * 2, SLICE_BYTES = COLUMNS * STEP * 2, STAGE_BYTES = IMAGE_BYTES + SLICE_BYTES;
constexpr int BIAS_BYTES = PARTICLES * COLUMNS * 4;
constexpr int BARRIERS_AT = STAGES * STAGE_BYTES + 2 * BIAS_BYTES;
#define INFINITE __int_as_float(0x7f800000)

struct alignas(64) Map { char bytes[128]; };

struct Problem {
    const float *offset;  // log prior of each row's shift
    float *bound;         // below the log of each particle's sum, rising
    int *count;           // candidates of each particle
    const long long *start;
    const int *room;
    float *value;
    int *place;
    float *row_top, *row_sum;  // [column tiles, rows]
    int rows, slices, shifts, length, group;
    float depth, share;
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

__device__ __forceinline__ void copy_tile(u32 to, const Map *map, u32 barrier, int column, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
        "l"((u64)map), "r"(barrier), "r"(column), "r"(row)
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

// Tile number -> first row and tile of columns: `group` tiles of rows share the slices in the cache.
__device__ __forceinline__ void locate(int tile, int row_tiles, int column_tiles, int group, int &row_0, int &column) {
    int band = tile / (group * column_tiles) * group;
    int height = min(row_tiles - band, group);
    int within = tile - band * column_tiles;
    row_0 = (band + within % height) * ROWS;
    column = within / height;
}

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

__device__ __forceinline__ void raise(float *bound, float value) {
    if (value >= 0)
        atomicMax((int *)bound, __float_as_int(value));
    else
        atomicMin((u32 *)bound, __float_as_uint(value));
}

// One of the two rows that a thread has a part of.
struct Row {
    int row, b;
    bool valid, near;
    float offset, top, reach, known, least;

    __device__ __forceinline__ Row(int row, const Problem &p) : row(row), valid(row < p.rows) {
        b = min(row, p.rows - 1) / p.shifts;
        offset = valid ? __ldg(p.offset + row) : -INFINITE;
        known = __ldcg(p.bound + b);
    }

    __device__ __forceinline__ void compare(float largest, const Problem &p) {
        top = quad_max(largest);
        reach = top + offset;
        near = valid && !(reach <= known - p.depth);  // NaN is near
    }

    __device__ __forceinline__ void finish(float total, int column, const Problem &p) const {
        long long at = (long long)column * p.rows + row;
        if (valid && (threadIdx.x & 3) == 0) {
            p.row_top[at] = reach;
            p.row_sum[at] = near ? total : 0.0f;
        }
    }

    __device__ __forceinline__ void learn(float total, const Problem &p) {
        float log_sum = reach + __logf(total);
        if (near && log_sum > known && (threadIdx.x & 3) == 0) raise(p.bound + b, log_sum);
        if (log_sum > known) known = log_sum;
    }

    __device__ __forceinline__ void demand(const Problem &p) {
        float newest = __ldcg(p.bound + b);
        least = near ? fmaxf(known, newest) + p.share - offset : INFINITE;
    }
};

// Where the candidates of this thread's rows go: one addition to `count` for each of the (at most two) particles of a warp.
__device__ __forceinline__ void take_room(const Row &upper, const Row &lower, int in_upper, int in_lower, const Problem &p, int &at_upper, int &at_lower) {
    int lane = threadIdx.x & 31, first = __shfl_sync(~0u, upper.b, 0), last = __shfl_sync(~0u, lower.b, 31);
    for (int b = first; b <= last; b++) {
        int mine = (upper.b == b ? in_upper : 0) + (lower.b == b ? in_lower : 0), before = mine;
        for (int step = 1; step < 32; step *= 2) {
            int other = __shfl_up_sync(~0u, before, step);
            if (lane >= step) before += other;
        }
        int all = __shfl_sync(~0u, before, 31), from = 0;
        if (lane == 0 && all) from = atomicAdd(p.count + b, all);
        from = __shfl_sync(~0u, from, 0) + before - mine;
        if (upper.b == b) at_upper = from, from += in_upper;
        if (lower.b == b) at_lower = from;
    }
}

__device__ __forceinline__ void reduce(float (&s)[128], const float *bias, int row, int row_0, int column, const Problem &p, u32 bias_read) {
    Row upper(row_0 + row, p), lower(row_0 + row + 8, p);
    int first_b = row_0 / p.shifts, lane_column = (threadIdx.x & 3) * 2;
    const float *upper_bias = bias + min(upper.b - first_b, PARTICLES - 1) * COLUMNS + lane_column;
    const float *lower_bias = bias + min(lower.b - first_b, PARTICLES - 1) * COLUMNS + lane_column;
    float upper_top = -INFINITE, lower_top = -INFINITE;
#pragma unroll
    for (int j = 0; j < 32; j++) {
        float2 of_upper = *(const float2 *)(upper_bias + 8 * j), of_lower = *(const float2 *)(lower_bias + 8 * j);
        s[4 * j] += of_upper.x, s[4 * j + 1] += of_upper.y, s[4 * j + 2] += of_lower.x, s[4 * j + 3] += of_lower.y;
        upper_top = fmaxf(upper_top, fmaxf(s[4 * j], s[4 * j + 1])), lower_top = fmaxf(lower_top, fmaxf(s[4 * j + 2], s[4 * j + 3]));
    }
    barrier_arrive(bias_read);
    upper.compare(s[0] != s[0] ? s[0] : upper_top, p), lower.compare(s[2] != s[2] ? s[2] : lower_top, p);
    float upper_sum = 0, lower_sum = 0;
    if (__any_sync(~0u, upper.near || lower.near)) {
        float upper_base = upper.top > -INFINITE ? upper.top : 0, lower_base = lower.top > -INFINITE ? lower.top : 0;
#pragma unroll
        for (int j = 0; j < 32; j++) {
            upper_sum += __expf(s[4 * j] - upper_base) + __expf(s[4 * j + 1] - upper_base);
            lower_sum += __expf(s[4 * j + 2] - lower_base) + __expf(s[4 * j + 3] - lower_base);
        }
        upper_sum = quad_sum(upper_sum), lower_sum = quad_sum(lower_sum);
        upper.learn(upper_sum, p), lower.learn(lower_sum, p);
        __syncwarp();
        upper.demand(p), lower.demand(p);
        if (__any_sync(~0u, upper.top >= upper.least || lower.top >= lower.least)) {
            int in_upper = 0, in_lower = 0, at_upper = 0, at_lower = 0;
#pragma unroll
            for (int j = 0; j < 32; j++) {
                in_upper += (s[4 * j] >= upper.least) + (s[4 * j + 1] >= upper.least);
                in_lower += (s[4 * j + 2] >= lower.least) + (s[4 * j + 3] >= lower.least);
            }
            take_room(upper, lower, in_upper, in_lower, p, at_upper, at_lower);
            int o = column * COLUMNS + lane_column;
#pragma unroll
            for (int n = 0; n < 128; n++) {
                const Row &of = n & 2 ? lower : upper;
                int &at = n & 2 ? at_lower : at_upper;
                if (s[n] >= of.least) {
                    if (at < __ldg(p.room + of.b)) {
                        long long to = __ldg(p.start + of.b) + at;
                        p.value[to] = s[n] + of.offset;
                        p.place[to] = (of.row - of.b * p.shifts) * p.slices + o + n / 4 * 8 + (n & 1);
                    }
                    at++;
                }
            }
        }
    }
    upper.finish(upper_sum, column, p), lower.finish(lower_sum, column, p);
}

extern "C" __global__ void __launch_bounds__(384, 1) coarse_product(
    const __grid_constant__ Map images, const __grid_constant__ Map slices, const __grid_constant__ Map bias, const float *offset,
    float *bound, int *count, const long long *start, const int *room, float *value, int *place, float *row_top, float *row_sum,
    int rows, int n_slices, int shifts, int length, int group, float depth, float share) {
    extern __shared__ __align__(1024) char memory[];
    const Problem p = {offset, bound, count, start, room, value, place, row_top, row_sum, rows, n_slices, shifts, length, group, depth, share};
    u32 stages = shared_address(memory), biases = stages + STAGES * STAGE_BYTES, barriers = stages + BARRIERS_AT;
    u32 full = barriers, empty = full + 8 * STAGES, bias_full = empty + 8 * STAGES, bias_empty = bias_full + 16;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) barrier_init(full + 8 * i, 1), barrier_init(empty + 8 * i, 2);
        for (int i = 0; i < 2; i++) barrier_init(bias_full + 8 * i, 1), barrier_init(bias_empty + 8 * i, 256);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    int row_tiles = (rows + ROWS - 1) / ROWS, column_tiles = (n_slices + COLUMNS - 1) / COLUMNS, tiles = row_tiles * column_tiles;
    int steps = (length + STEP - 1) / STEP, stage = 0, phase = 0, turn = 0;
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x == 0)
            for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, turn++) {
                int row_0, column, half = turn & 1;
                locate(tile, row_tiles, column_tiles, group, row_0, column);
                barrier_wait(bias_empty + 8 * half, ((turn >> 1) & 1) ^ 1);
                barrier_expect(bias_full + 8 * half, BIAS_BYTES);
                copy_tile(biases + half * BIAS_BYTES, &bias, bias_full + 8 * half, column * COLUMNS, row_0 / shifts);
                for (int step = 0; step < steps; step++) {
                    barrier_wait(empty + 8 * stage, phase ^ 1);
                    barrier_expect(full + 8 * stage, STAGE_BYTES);
                    u32 to = stages + stage * STAGE_BYTES;
                    copy_tile(to, &images, full + 8 * stage, step * STEP, row_0);
                    copy_tile(to + IMAGE_BYTES, &slices, full + 8 * stage, step * STEP, column * COLUMNS);
                    if (++stage == STAGES) stage = 0, phase ^= 1;
                }
            }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        int which = threadIdx.x / 128 - 1, row = which * 64 + (threadIdx.x & 127) / 32 * 16 + (threadIdx.x & 31) / 4;
        bool speaks = (threadIdx.x & 127) == 0;
        float s[128];
        for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, turn++) {
            int row_0, column, half = turn & 1, last = 0;
            locate(tile, row_tiles, column_tiles, group, row_0, column);
            for (int step = 0; step < steps; step++) {
                barrier_wait(full + 8 * stage, phase);
                u32 from = stages + stage * STAGE_BYTES + which * 64 * STEP * 2, with = stages + stage * STAGE_BYTES + IMAGE_BYTES;
                asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
                for (int k = 0; k < STEP / 16; k++)
                    if (step * STEP + k * 16 < length) multiply(s, operand(from + 32 * k), operand(with + 32 * k), step + k > 0);
                asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
                asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
                if (speaks && step > 0) barrier_arrive(empty + 8 * last);
                last = stage;
                if (++stage == STAGES) stage = 0, phase ^= 1;
            }
            asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
            if (speaks) barrier_arrive(empty + 8 * last);
            barrier_wait(bias_full + 8 * half, (turn >> 1) & 1);
            reduce(s, (const float *)(memory + STAGES * STAGE_BYTES + half * BIAS_BYTES), row, row_0, column, p, bias_empty + 8 * half);
        }
    }
}
