// Spreading by warps: each takes a run of points of one bin, adds them one after another to the cells of its tile in shared memory, all
// taps of a point at once, and carries the tile to the grid by atomics. A block is one warp, so points need no atomics among them.
// Compile with WIDTH, DEGREE (-1: weights come from a table), BIN_Z, BIN_Y, BIN_X. Tile: (BIN + WIDTH - 1) cells along each axis.
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
            const int word_x = packed[i], word_y = packed[points + i], word_z = packed[2 * (long long)points + i];
            const float2 value = values[(long long)blockIdx.y * points + order[i]];
            const int place = cell_of(word_z) * PLANE + cell_of(word_y) * PITCH + cell_of(word_x);
            given[lane] = {value.x, value.y, __int_as_float(place), 0};
            const float fx = fraction_of(word_x), fy = fraction_of(word_y), fz = fraction_of(word_z);
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
                weight[t * STRIDE + lane] = wx;
                weight[(WIDTH + t) * STRIDE + lane] = wy;
                weight[(2 * WIDTH + t) * STRIDE + lane] = wz;
            }
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
