// Spreading and interpolating by warps. Spreading: each takes a run of points of one bin, adds them one after another to the cells of its tile in shared memory, all
// taps of a point at once, and carries the tile to the grid by atomics. A block is one warp, so points need no atomics among them.
// Interpolating: each takes 32 points as they are visited, one after another; its threads read the taps of some rows of a plane at once.
// Compile with WIDTH, DEGREE (-1: weights come from a table), BIN_Z, BIN_Y, BIN_X, THREADS (of a block that interpolates).
// Tile: (BIN + WIDTH - 1) cells along each axis.
#ifndef ON_CPU
extern __shared__ float2 shared_lines[];
#endif
constexpr int CELLS = WIDTH * WIDTH * WIDTH, STEPS = (CELLS + 31) / 32;
constexpr int TILE_Z = BIN_Z + WIDTH - 1, TILE_Y = BIN_Y + WIDTH - 1, TILE_X = BIN_X + WIDTH - 1;
constexpr int WITHIN = 27;  // bits of a position within a cell: tiles.py
constexpr float LEVEL = 1.0f / 65535;  // of weights in tables

// From row to row and from plane to plane of a tile: taps side by side in the order (z, y, x) are so in banks, too.
constexpr int PITCH = TILE_X + (WIDTH - TILE_X % 16 + 32) % 16;
constexpr int PLANE = TILE_Y * PITCH + (WIDTH * WIDTH - TILE_Y * PITCH % 16 + 256) % 16;
constexpr int STRIDE = 33;  // from weight to weight; one is read, but not used, after 32 points
constexpr int GROUP = WIDTH <= 6 ? 4 : 2;  // points whose instructions are written out

__device__ __forceinline__ float fraction_of(int word) { return (word & ((1 << WITHIN) - 1)) * (1.0f / (1 << WITHIN)) - 0.5f; }
__device__ __forceinline__ int cell_of(int word) { return (word >> WITHIN) & 31; }

__device__ __forceinline__ void add_to(float2 *target, float2 value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(target), "f"(value.x), "f"(value.y) : "memory");
#else
    atomicAdd(&target->x, value.x);
    atomicAdd(&target->y, value.y);
#endif
}

struct Words {  // of a point
    int x, y, z;
    __device__ Words(const int *packed, long long i, int points) : x(packed[i]), y(packed[points + i]), z(packed[2 * (long long)points + i]) {}
};

// The weights of point i, STRIDE apart: of all taps along x, then y, then z.
__device__ __forceinline__ void weigh(float *weight, const Words &word, const float *coefficient, const void *taps, long long i) {
    const float fx = fraction_of(word.x), fy = fraction_of(word.y), fz = fraction_of(word.z);
    const unsigned short *const row = (const unsigned short *)taps + 3 * WIDTH * i;
#pragma unroll
    for (int t = 0; t < WIDTH; ++t) {
        float wx = coefficient[DEGREE < 0 ? 0 : t], wy = wx, wz = wx;
#pragma unroll
        for (int d = 1; d <= DEGREE; ++d) {
            const float c = coefficient[d * WIDTH + t];
            wx = wx * fx + c, wy = wy * fy + c, wz = wz * fz + c;
        }
        if (DEGREE < 0) wx = row[t] * LEVEL, wy = row[WIDTH + t] * LEVEL, wz = row[2 * WIDTH + t] * LEVEL;
        weight[t * STRIDE] = wx;
        weight[(WIDTH + t) * STRIDE] = wy;
        weight[(2 * WIDTH + t) * STRIDE] = wz;
    }
}

// grid [B, Z, Y, X], values [B, points]; run [T, 2]: first point and how many; packed [3, points], bin, order: tiles.py. Grid: (T, B).
extern "C" __global__ void __launch_bounds__(32) spread_warps(
    float2 *grid, const float2 *values, const int *packed, const int *bin, const int *order, const void *taps, const int *run, int points,
    int planes, int height, int size, int bins_y, int bins_x, int low_z, int low_y) {
    __shared__ float weight[3 * WIDTH * STRIDE], coefficient[(DEGREE + 1) * WIDTH + 1];
    __shared__ float4 given[32 + 1];  // value and place of each point
    float2 *const tile = shared_lines;
    const int lane = threadIdx.x, first = run[2 * blockIdx.x], length = run[2 * blockIdx.x + 1];
    for (int i = lane; i < TILE_Z * PLANE; i += 32) tile[i] = make_float2(0, 0);
    for (int i = lane; i < (DEGREE + 1) * WIDTH; i += 32) coefficient[i] = ((const float *)taps)[i];
    int at[STEPS], x[STEPS], y[STEPS], z[STEPS];  // of this lane's taps: where in the tile, and which weights
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
        const unsigned some = threadIdx.x % 32u + 32 * s, tap = CELLS % 32 == 0 || some < CELLS ? some : CELLS - 1, dz = tap / (WIDTH * WIDTH), dy = tap / WIDTH % WIDTH, dx = tap % WIDTH;
        at[s] = dz * PLANE + dy * PITCH + dx;
        x[s] = dx * STRIDE, y[s] = (WIDTH + dy) * STRIDE, z[s] = (2 * WIDTH + dz) * STRIDE;
    }
    const bool last = CELLS % 32 == 0 || lane + 32 * (STEPS - 1) < CELLS;
    for (int done = 0; done < length; done += 32) {
        const int some = min(32, length - done);
        __syncwarp();
        if (lane >= some) {
            given[lane] = {0, 0, 0, 0};
#pragma unroll
            for (int t = 0; t < 3 * WIDTH; ++t) weight[t * STRIDE + lane] = 0;
        } else {
            const long long i = (long long)first + done + lane;
            const Words word(packed, i, points);
            const float2 value = values[(long long)blockIdx.y * points + order[i]];
            const int place = cell_of(word.z) * PLANE + cell_of(word.y) * PITCH + cell_of(word.x);
            given[lane] = {value.x, value.y, __int_as_float(place), 0};
            weigh(weight + lane, word, coefficient, taps, i);
        }
        __syncwarp();
        float product[STEPS];
        float4 one = given[0];
#pragma unroll
        for (int s = 0; s < STEPS; ++s) product[s] = weight[x[s]] * weight[y[s]] * weight[z[s]];
        for (int group = 0; group < some; group += GROUP) {
#pragma unroll
            for (int p = 1; p <= GROUP; ++p) {
                float2 *const cells = tile + __float_as_int(one.z);
                float2 sum[STEPS];
#pragma unroll
                for (int s = 0; s < STEPS; ++s) sum[s] = cells[at[s]];
#pragma unroll
                for (int s = 0; s < STEPS; ++s) sum[s].x += product[s] * one.x, sum[s].y += product[s] * one.y;
                one = given[group + p];  // the next point's weights come while this point's sums go
#pragma unroll
                for (int s = 0; s < STEPS; ++s) product[s] = weight[group + p + x[s]] * weight[group + p + y[s]] * weight[group + p + z[s]];
#pragma unroll
                for (int s = 0; s < STEPS; ++s)
                    if (s < STEPS - 1 || last) cells[at[s]] = sum[s];
                __syncwarp();
            }
        }
    }
    __syncwarp();
    const int one_bin = bin[first], row_of_bins = one_bin / bins_x;
    const int left = one_bin % bins_x * BIN_X, top = row_of_bins % bins_y * BIN_Y - low_y, front = row_of_bins / bins_y * BIN_Z - low_z;
    float2 *const target = grid + (long long)blockIdx.y * planes * height * size;
    for (int dx = lane; dx < TILE_X; dx += 32) {
        const int column = (left + dx) % size;
        for (int dz = max(0, -front); dz < TILE_Z; ++dz) {
            int row = max(top, 0) % height;
            float2 *to = target + ((long long)((front + dz) % planes) * height + row) * size + column;
#pragma unroll 4
            for (int dy = max(0, -top); dy < TILE_Y; ++dy) {
                const float2 sum = tile[dz * PLANE + dy * PITCH + dx];
                if (sum.x != 0 || sum.y != 0) add_to(to, sum);
                to += size;
                if (++row == height) row = 0, to -= (long long)height * size;
            }
        }
    }
}

constexpr int FLAT = WIDTH * WIDTH, LAYERS = FLAT <= 16 ? 32 / FLAT : 1;  // taps of a plane, planes at once
constexpr int ROUNDS = (FLAT * LAYERS + 31) / 32, DEEP = (WIDTH + LAYERS - 1) / LAYERS;
static_assert(WIDTH % LAYERS == 0, "windows of 3 cells and more");
constexpr int TOGETHER = 4;  // points whose sums over threads are taken at once

// values [B, points] = sums of the grid [B, Z, Y, X], of less than 2^32 cells, around points. Grid: (blocks of THREADS points, B).
extern "C" __global__ void __launch_bounds__(THREADS) interpolate_warps(
    const float2 *grid, float *values, const int *packed, const int *bin, const int *order, const void *taps, int points, int planes,
    int height, int size, int bins_y, int bins_x, int low_z, int low_y) {
    constexpr int WARPS = THREADS / 32;
    __shared__ float weights[WARPS][3 * WIDTH * STRIDE], coefficient[(DEGREE + 1) * WIDTH + 1];
    __shared__ int4 givens[WARPS][32];  // first cell of each point, and where its value goes
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float *const weight = weights[warp];
    int4 *const given = givens[warp];
    const long long i = (long long)blockIdx.x * THREADS + threadIdx.x;
    for (int k = threadIdx.x; k < (DEGREE + 1) * WIDTH; k += THREADS) coefficient[k] = ((const float *)taps)[k];
    __syncthreads();
    if (i < points) {
        const Words word(packed, i, points);
        const int one = bin[i], row = one / bins_x;
        given[lane] = {one % bins_x * BIN_X + cell_of(word.x), row % bins_y * BIN_Y - low_y + cell_of(word.y),
                       row / bins_y * BIN_Z - low_z + cell_of(word.z), order[i]};
        weigh(weight + lane, word, coefficient, taps, i);
    } else {
        given[lane] = {0, 0, 0, -1};
#pragma unroll
        for (int t = 0; t < 3 * WIDTH; ++t) weight[t * STRIDE + lane] = 0;
    }
    __syncwarp();
    const unsigned plane = (unsigned)height * size, all = plane * planes;
    grid += (long long)blockIdx.y * all;
    int dx[ROUNDS], dy[ROUNDS];  // of this thread's taps; threads without any read what another one reads
    float has[ROUNDS];
#pragma unroll
    for (int s = 0; s < ROUNDS; ++s) {
        const int tap = min(lane + 32 * s, FLAT * LAYERS - 1) % FLAT;
        dx[s] = tap % WIDTH, dy[s] = tap / WIDTH, has[s] = lane + 32 * s < FLAT * LAYERS;
    }
    const int layer = min(lane / FLAT, LAYERS - 1);
#pragma unroll 1
    for (int group = 0; group < 32; group += TOGETHER) {
        float sum[2 * TOGETHER];
#pragma unroll
        for (int p = 0; p < TOGETHER; ++p) {
            const int4 at = given[group + p];
            const int before = planes - at.z - layer;  // planes until the grid begins anew
            float2 total = make_float2(0, 0);
#pragma unroll
            for (int s = 0; s < ROUNDS; ++s) {
                int x = at.x + dx[s], y = at.y + dy[s];
                x = x >= size ? x - size : x, y = y >= height ? y - height : y;
                const unsigned from = (unsigned)(at.z + layer) * plane + (unsigned)(y * size + x);
                float2 cell[DEEP], part = make_float2(0, 0);
#pragma unroll
                for (int k = 0; k < DEEP; ++k) cell[k] = grid[from + k * LAYERS * plane - (k * LAYERS >= before ? all : 0)];
#pragma unroll
                for (int k = 0; k < DEEP; ++k) {
                    const float wz = weight[(2 * WIDTH + k * LAYERS + layer) * STRIDE + group + p];
                    part.x += wz * cell[k].x, part.y += wz * cell[k].y;
                }
                const float w = has[s] * weight[dx[s] * STRIDE + group + p] * weight[(WIDTH + dy[s]) * STRIDE + group + p];
                total.x += w * part.x, total.y += w * part.y;
            }
            sum[2 * p] = total.x, sum[2 * p + 1] = total.y;
        }
        // Halves of the warp take halves of the sums, until four threads have one each.
#pragma unroll
        for (int half = 16, many = TOGETHER; many >= 1; half /= 2, many /= 2)
#pragma unroll
            for (int v = 0; v < many; ++v) {
                const bool high = lane & half;
                const float other = __shfl_xor_sync(0xffffffffu, high ? sum[v] : sum[v + many], half);
                sum[v] = (high ? sum[v + many] : sum[v]) + other;
            }
        sum[0] += __shfl_xor_sync(0xffffffffu, sum[0], 2);
        sum[0] += __shfl_xor_sync(0xffffffffu, sum[0], 1);
        const int which = lane / 4, to = given[group + which / 2].w;
        if (lane % 4 == 0 && to >= 0) values[2 * ((long long)blockIdx.y * points + to) + which % 2] = sum[0];
    }
}
