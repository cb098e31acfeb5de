// Far fields on the GPU in three walks through memory: see README.md. A line of a window is transformed by its threads in registers,
// which meet in shared memory. Compile with NY, NX (32 to 1024, powers of two), COUNTS (type of a count), and for a step FITTED_LIGHT.
struct Half {  // float16, not negative; infinities and what is no number become 0
    unsigned short bits;
    __device__ __forceinline__ operator float() const { return bits < 0x7c00 ? __int_as_float(bits << 13) * 0x1p112f : 0.0f; }
};

#ifndef COUNTS
#define COUNTS float
#endif
#ifndef FITTED_LIGHT
#define FITTED_LIGHT 1
#endif

__host__ __device__ constexpr int elements_of(int n) { return n >= 128 ? 16 : 8; }  // of a line that a thread holds
__host__ __device__ constexpr int threads_of(int n) { return n / elements_of(n); }  // of a line
__host__ __device__ constexpr int lines_of(int n, int others) { return 256 / threads_of(n) < others ? 256 / threads_of(n) : others; }
__host__ __device__ constexpr int pitch_of(int n) { return n + n / 16 + 1; }  // of a line in shared memory: no two threads in a bank

constexpr int EX = elements_of(NX), TX = threads_of(NX), ROWS = lines_of(NX, NY), ROW_THREADS = TX * ROWS;
constexpr int EY = elements_of(NY), TY = threads_of(NY), COLUMNS = lines_of(NY, NX), COLUMN_THREADS = TY * COLUMNS;
constexpr int WARPS = (COLUMN_THREADS + 31) / 32;
constexpr int MOST_STEPS = 8;

__device__ __forceinline__ float2 operator+(float2 a, float2 b) { return make_float2(a.x + b.x, a.y + b.y); }
__device__ __forceinline__ float2 operator-(float2 a, float2 b) { return make_float2(a.x - b.x, a.y - b.y); }
__device__ __forceinline__ float2 operator*(float2 a, float2 b) { return make_float2(a.x * b.x - a.y * b.y, a.x * b.y + a.y * b.x); }
__device__ __forceinline__ float2 operator*(float a, float2 b) { return make_float2(a * b.x, a * b.y); }
__device__ __forceinline__ float2 conj_times(float2 a, float2 b) { return make_float2(a.x * b.x + a.y * b.y, a.x * b.y - a.y * b.x); }
__device__ __forceinline__ float2 swapped(float2 a) { return make_float2(a.y, a.x); }  // transforms forward become inverse between two
__device__ __forceinline__ float dot(float2 a, float2 b) { return a.x * b.x + a.y * b.y; }

__device__ __forceinline__ void dft4(float2 &a, float2 &b, float2 &c, float2 &d) {  // results in order
    const float2 ac = a + c, ca = a - c, bd = b + d, db = make_float2((b - d).y, (d - b).x);  // -i (b - d)
    a = ac + bd;
    c = ac - bd;
    b = ca + db;
    d = ca - db;
}

template <int R> struct Dft;
template <> struct Dft<2> {
    template <int STRIDE> static __device__ __forceinline__ void run(float2 *v) {
        const float2 a = v[0], b = v[STRIDE];
        v[0] = a + b;
        v[STRIDE] = a - b;
    }
};
template <> struct Dft<4> {
    template <int STRIDE> static __device__ __forceinline__ void run(float2 *v) {
        dft4(v[0], v[STRIDE], v[2 * STRIDE], v[3 * STRIDE]);
    }
};
template <> struct Dft<8> {  // 2 x 4: evens and odds, then pairs
    template <int STRIDE> static __device__ __forceinline__ void run(float2 *v) {
        constexpr float H = 0.70710678118654752f;
        float2 e[4], o[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) e[i] = v[2 * i * STRIDE], o[i] = v[(2 * i + 1) * STRIDE];
        dft4(e[0], e[1], e[2], e[3]);
        dft4(o[0], o[1], o[2], o[3]);
        o[1] = make_float2(H * (o[1].x + o[1].y), H * (o[1].y - o[1].x));
        o[2] = make_float2(o[2].y, -o[2].x);
        o[3] = make_float2(H * (o[3].y - o[3].x), -H * (o[3].x + o[3].y));
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i * STRIDE] = e[i] + o[i], v[(i + 4) * STRIDE] = e[i] - o[i];
    }
};
template <> struct Dft<16> {  // 4 x 4
    template <int STRIDE> static __device__ __forceinline__ void run(float2 *v) {
        constexpr float C = 0.92387953251128674f, S = 0.38268343236508977f, H = 0.70710678118654752f;
#pragma unroll
        for (int a = 0; a < 4; ++a) dft4(v[a * STRIDE], v[(a + 4) * STRIDE], v[(a + 8) * STRIDE], v[(a + 12) * STRIDE]);
        const float2 w[10] = {{1, 0}, {C, -S}, {H, -H}, {S, -C}, {0, -1}, {-S, -C}, {-H, -H}, {-C, -S}, {-1, 0}, {-C, S}};
#pragma unroll
        for (int a = 1; a < 4; ++a)
#pragma unroll
            for (int c = 1; c < 4; ++c) v[(a + 4 * c) * STRIDE] = v[(a + 4 * c) * STRIDE] * w[a * c];
        float2 u[16];
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            dft4(v[4 * c * STRIDE], v[(4 * c + 1) * STRIDE], v[(4 * c + 2) * STRIDE], v[(4 * c + 3) * STRIDE]);
#pragma unroll
            for (int d = 0; d < 4; ++d) u[c + 4 * d] = v[(4 * c + d) * STRIDE];
        }
#pragma unroll
        for (int i = 0; i < 16; ++i) v[i * STRIDE] = u[i];
    }
};

// One stage of Stockham's transform of N numbers, of which thread t holds t + T i; DONE: product of the radices before.
template <int N, int R, int DONE> __device__ __forceinline__ void stage(float2 *v, int t, float2 *line) {
    constexpr int E = elements_of(N), T = threads_of(N), APART = E / R;
    constexpr bool LAST = DONE * R == N;
#pragma unroll
    for (int q = 0; q < APART; ++q) {
        const int k = (t + q * T) % DONE;
        if (DONE > 1) {
            float2 w[R];
            sincospif(-2.0f * k / (DONE * R), &w[1].y, &w[1].x);
#pragma unroll
            for (int r = 2; r < R; ++r) w[r] = w[r / 2] * w[r - r / 2];
#pragma unroll
            for (int r = 1; r < R; ++r) v[q + r * APART] = v[q + r * APART] * w[r];
        }
        Dft<R>::template run<APART>(v + q);
    }
    if (LAST) return;
    __syncthreads();  // what was read before has been read by all
#pragma unroll
    for (int q = 0; q < APART; ++q) {
        const int j = t + q * T, first = j / DONE * DONE * R + j % DONE;
#pragma unroll
        for (int r = 0; r < R; ++r) {
            const int place = first + r * DONE;
            line[place + place / 16] = v[q + r * APART];
        }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < E; ++i) v[i] = line[t + T * i + (t + T * i) / 16];
}

// Transform, not scaled, of a line of N numbers; called by all threads of a block.
template <int N> __device__ __forceinline__ void transform(float2 *v, int t, float2 *line) {
    if constexpr (N == 32) stage<N, 8, 1>(v, t, line), stage<N, 4, 8>(v, t, line);
    if constexpr (N == 64) stage<N, 8, 1>(v, t, line), stage<N, 8, 8>(v, t, line);
    if constexpr (N == 128) stage<N, 16, 1>(v, t, line), stage<N, 8, 16>(v, t, line);
    if constexpr (N == 256) stage<N, 16, 1>(v, t, line), stage<N, 16, 16>(v, t, line);
    if constexpr (N == 512) stage<N, 16, 1>(v, t, line), stage<N, 16, 16>(v, t, line), stage<N, 2, 256>(v, t, line);
    if constexpr (N == 1024) stage<N, 16, 1>(v, t, line), stage<N, 16, 16>(v, t, line), stage<N, 4, 256>(v, t, line);
}

__device__ __forceinline__ void add(float2 *to, float2 value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    atomicAdd(to, value);
#else
    atomicAdd(&to->x, value.x);
    atomicAdd(&to->y, value.y);
#endif
}

// Where a thread of a block of rows stands: block = (rows, position and mode), so that neighbours are at work on one window.
struct Row {
    int t, y, b, m;
    float2 *line;
    __device__ Row(float2 *shared, int modes) {
        t = threadIdx.x % TX;
        y = blockIdx.x * ROWS + threadIdx.x / TX;
        b = blockIdx.y / modes;
        m = blockIdx.y % modes;
        line = shared + threadIdx.x / TX * pitch_of(NX);
    }
};

// wave[b, m] = rows of object x light, transformed. own: numbers from one position's light to the next, 0: one for all.
extern "C" __global__ void __launch_bounds__(ROW_THREADS) rows_forward(
    float2 *wave, const float2 *object, const long long *corner, const float2 *light, int width, int modes, int own) {
    __shared__ float2 shared[ROWS * pitch_of(NX)];
    const Row at(shared, modes);
    const float2 *seen = object + (corner[2 * at.b] + at.y) * width + corner[2 * at.b + 1];
    const float2 *lit = light + (long long)at.b * own + (at.m * NY + at.y) * NX;
    float2 v[EX];
#pragma unroll
    for (int i = 0; i < EX; ++i) v[i] = seen[at.t + TX * i] * lit[at.t + TX * i];
    transform<NX>(v, at.t, at.line);
    float2 *out = wave + ((long long)blockIdx.y * NY + at.y) * NX;
#pragma unroll
    for (int i = 0; i < EX; ++i) out[at.t + TX * i] = v[i];
}

// first = rows of light d object + d light object, second = d light d object (FITTED_LIGHT), both transformed.
extern "C" __global__ void __launch_bounds__(ROW_THREADS) rows_step(
    float2 *first, float2 *second, const float2 *object, const float2 *d_object, const long long *corner,
    const float2 *light, const float2 *d_light, int width, int modes, int own, int d_own) {
    __shared__ float2 shared[ROWS * pitch_of(NX)];
    const Row at(shared, modes);
    const long long seen = (corner[2 * at.b] + at.y) * width + corner[2 * at.b + 1];
    const int in_light = (at.m * NY + at.y) * NX;
    const float2 *lit = light + (long long)at.b * own + in_light;
    float2 v[EX];
#pragma unroll
    for (int i = 0; i < EX; ++i) v[i] = d_object[seen + at.t + TX * i] * lit[at.t + TX * i];
    const long long out = ((long long)blockIdx.y * NY + at.y) * NX;
#if FITTED_LIGHT
    const float2 *d_lit = d_light + (long long)at.b * d_own + in_light;
    float2 u[EX];
#pragma unroll
    for (int i = 0; i < EX; ++i) {
        const float2 change = d_lit[at.t + TX * i];
        v[i] = v[i] + object[seen + at.t + TX * i] * change;
        u[i] = d_object[seen + at.t + TX * i] * change;
    }
    transform<NX>(u, at.t, at.line);
#pragma unroll
    for (int i = 0; i < EX; ++i) second[out + at.t + TX * i] = u[i];
#endif
    transform<NX>(v, at.t, at.line);
#pragma unroll
    for (int i = 0; i < EX; ++i) first[out + at.t + TX * i] = v[i];
}

// What a pixel was counted and predicted to be.
struct Noise {
    float offset, floor;
    int poisson;
};

__device__ __forceinline__ float count_of(const COUNTS *counts, float weight, long long pixel) {
    const float n = weight > 0 ? (float)counts[pixel] : 0.0f;
    return isfinite(n) ? n * weight : 0.0f;
}

// Sums over a warp's threads, the same in each.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int apart = 16; apart > 0; apart /= 2) value += __shfl_xor_sync(0xffffffffu, value, apart);
    return value;
}

// Where a thread of a block of columns stands: block = (columns, position).
struct Column {
    int t, x, b;
    float2 *line;
    __device__ Column(float2 *shared) {
        t = threadIdx.x / COLUMNS;
        x = blockIdx.x * COLUMNS + threadIdx.x % COLUMNS;
        b = blockIdx.y;
        line = shared + threadIdx.x % COLUMNS * pitch_of(NY);
    }
};

__device__ __forceinline__ void load_column(float2 *v, const float2 *wave, long long plane, const Column &at) {
#pragma unroll
    for (int i = 0; i < EY; ++i) v[i] = wave[(plane * NY + at.t + TY * i) * NX + at.x];
    transform<NY>(v, at.t, at.line);
}

// wave[b, m] := columns of the slope times the wave at the detector, transformed back; sums[b, block, 3]: loss, (sqrt I - sqrt n)^2, n.
extern "C" __global__ void __launch_bounds__(COLUMN_THREADS) columns_slope(
    float2 *wave, float *sums, const COUNTS *counts, const float *weight, const float *scale, const float *background,
    const long long *rows, int modes, float offset, float floor_, int poisson) {
    __shared__ float2 shared[COLUMNS * pitch_of(NY)];
    __shared__ float parts[WARPS][3];
    const Column at(shared);
    const float unitary = rsqrtf((float)NY * NX), bright = scale[rows[at.b]];
    float2 v[EY];
    float slope[EY];
#pragma unroll
    for (int i = 0; i < EY; ++i) slope[i] = 0;
    for (int m = 0; m < modes; ++m) {
        load_column(v, wave, (long long)at.b * modes + m, at);
#pragma unroll
        for (int i = 0; i < EY; ++i) slope[i] += dot(v[i], v[i]);
    }
    float loss = 0, mismatch = 0, counted = 0;
#pragma unroll
    for (int i = 0; i < EY; ++i) {
        const int pixel = (at.t + TY * i) * NX + at.x;
        const float good = weight[pixel], n = count_of(counts, good, rows[at.b] * (NY * NX) + pixel);
        const float intensity = bright * unitary * unitary * slope[i] + background[pixel];
        const float apart = sqrtf(fmaxf(intensity, 0.0f)) - sqrtf(n);
        mismatch += good * apart * apart;
        counted += good * n;
        if (poisson) {
            const float now = fmaxf(intensity, floor_);
            loss += good * (now - n + (n > 0 ? n * logf(n / now) : 0.0f));
            slope[i] = good * (1 - n / now);
        } else {
            const float root = sqrtf(fmaxf(intensity + offset, floor_)), wanted = sqrtf(n + offset);
            loss += good * (root - wanted) * (root - wanted);
            slope[i] = good * (1 - wanted / root);
        }
        slope[i] *= 2 * bright * unitary * unitary;
    }
    loss = warp_sum(loss), mismatch = warp_sum(mismatch), counted = warp_sum(counted);
    if (threadIdx.x % 32 == 0) {
        parts[threadIdx.x / 32][0] = loss, parts[threadIdx.x / 32][1] = mismatch, parts[threadIdx.x / 32][2] = counted;
    }
    for (int m = 0; m < modes; ++m) {
        const long long plane = (long long)at.b * modes + m;
        if (modes > 1) load_column(v, wave, plane, at);
#pragma unroll
        for (int i = 0; i < EY; ++i) v[i] = swapped(slope[i] * v[i]);
        transform<NY>(v, at.t, at.line);
#pragma unroll
        for (int i = 0; i < EY; ++i) wave[(plane * NY + at.t + TY * i) * NX + at.x] = swapped(v[i]);
    }
    __syncthreads();
    if (threadIdx.x < 3) {
        float total = 0;
        for (int warp = 0; warp < WARPS; ++warp) total += parts[warp][threadIdx.x];
        sums[((long long)at.b * gridDim.x + blockIdx.x) * 3 + threadIdx.x] = total;
    }
}

// sums[b, block, step, 3]: misfit and two derivatives at lengths steps[0 .. count) of waves wave + t first + t^2 second.
extern "C" __global__ void __launch_bounds__(COLUMN_THREADS) columns_along(
    const float2 *wave, const float2 *first, const float2 *second, float *sums, const COUNTS *counts, const float *weight,
    const float *scale, const float *background, const long long *rows, const float *steps, int count, int modes,
    float offset, float floor_, int poisson) {
    __shared__ float2 shared[COLUMNS * pitch_of(NY)];
    __shared__ float parts[WARPS][3 * MOST_STEPS];
    constexpr int DEGREE = FITTED_LIGHT ? 4 : 2;
    const Column at(shared);
    const float bright = scale[rows[at.b]] / ((float)NY * NX);
    float c[DEGREE + 1][EY];
#pragma unroll
    for (int d = 0; d <= DEGREE; ++d)
#pragma unroll
        for (int i = 0; i < EY; ++i) c[d][i] = 0;
    for (int m = 0; m < modes; ++m) {
        const long long plane = (long long)at.b * modes + m;
        float2 v[EY], u[EY];
        load_column(v, wave, plane, at);
        load_column(u, first, plane, at);
#pragma unroll
        for (int i = 0; i < EY; ++i) c[0][i] += dot(v[i], v[i]), c[1][i] += 2 * dot(v[i], u[i]), c[2][i] += dot(u[i], u[i]);
#if FITTED_LIGHT
        float2 w[EY];
        load_column(w, second, plane, at);
#pragma unroll
        for (int i = 0; i < EY; ++i)
            c[2][i] += 2 * dot(v[i], w[i]), c[3][i] += 2 * dot(u[i], w[i]), c[4][i] += dot(w[i], w[i]);
#endif
    }
    float n[EY], good[EY];
#pragma unroll
    for (int i = 0; i < EY; ++i) {
        const int pixel = (at.t + TY * i) * NX + at.x;
        good[i] = weight[pixel];
        n[i] = count_of(counts, good[i], rows[at.b] * (NY * NX) + pixel);
        if (!poisson) n[i] = sqrtf(n[i] + offset);
#pragma unroll
        for (int d = 0; d <= DEGREE; ++d) c[d][i] *= bright;
        c[0][i] += background[pixel];
    }
    for (int k = 0; k < count; ++k) {
        const float t = steps[k];
        float loss = 0, slope_sum = 0, bend_sum = 0;
#pragma unroll
        for (int i = 0; i < EY; ++i) {
            float now = c[DEGREE][i], down = 0, twice = 0;
#pragma unroll
            for (int d = DEGREE - 1; d >= 0; --d) {
                twice = twice * t + 2 * down;
                down = down * t + now;
                now = now * t + c[d][i];
            }
            float slope, bend, missed;
            if (poisson) {
                now = fmaxf(now, floor_);
                missed = now - n[i] + (n[i] > 0 ? n[i] * logf(n[i] / now) : 0.0f);
                slope = 1 - n[i] / now, bend = n[i] / (now * now);
            } else {
                const float inverse = rsqrtf(fmaxf(now + offset, floor_)), root = fmaxf(now + offset, floor_) * inverse;
                missed = (root - n[i]) * (root - n[i]);
                slope = 1 - n[i] * inverse, bend = 0.5f * n[i] * inverse * inverse * inverse;
            }
            loss += good[i] * missed;
            slope_sum += good[i] * slope * down;
            bend_sum += good[i] * (bend * down * down + slope * twice);
        }
        loss = warp_sum(loss), slope_sum = warp_sum(slope_sum), bend_sum = warp_sum(bend_sum);
        if (threadIdx.x % 32 == 0) {
            float *part = parts[threadIdx.x / 32] + 3 * k;
            part[0] = loss, part[1] = slope_sum, part[2] = bend_sum;
        }
    }
    __syncthreads();
    for (int j = threadIdx.x; j < 3 * count; j += COLUMN_THREADS) {
        float total = 0;
        for (int warp = 0; warp < WARPS; ++warp) total += parts[warp][j];
        sums[((long long)at.b * gridDim.x + blockIdx.x) * 3 * count + j] = total;
    }
}

// Rows transformed back and spread: object += conj(light) wave by atomics; of the light the sum over `group` positions of
// conj(object) wave, added to one (own = 0), or written for each. Curvatures: sums of scale |light|^2 and of scale |object|^2, of one
// light for all. What is null is not asked for. block = (rows, group of positions and mode).
extern "C" __global__ void __launch_bounds__(ROW_THREADS) rows_back(
    float2 *object_gradient, float2 *light_gradient, float *object_curvature, float *light_curvature, const float2 *wave,
    const float2 *object, const long long *corner, const float2 *light, const float *scale, const long long *rows, int width,
    int batch, int modes, int own, int group) {
    __shared__ float2 shared[ROWS * pitch_of(NX)];
    const int t = threadIdx.x % TX, y = blockIdx.x * ROWS + threadIdx.x / TX, m = blockIdx.y % modes;
    float2 *line = shared + threadIdx.x / TX * pitch_of(NX);
    const int in_light = (m * NY + y) * NX;
    float2 total[EX];
    float seen_power[EX];
#pragma unroll
    for (int i = 0; i < EX; ++i) total[i] = make_float2(0, 0), seen_power[i] = 0;
    const int begin = blockIdx.y / modes * group;
    for (int b = begin; b < min(batch, begin + group); ++b) {
        float2 v[EX];
        const float2 *in = wave + (((long long)b * modes + m) * NY + y) * NX;
#pragma unroll
        for (int i = 0; i < EX; ++i) v[i] = swapped(in[t + TX * i]);
        transform<NX>(v, t, line);
        const long long seen = (corner[2 * b] + y) * width + corner[2 * b + 1];
        const float2 *lit = light + (long long)b * own + in_light;
#pragma unroll
        for (int i = 0; i < EX; ++i) {
            const float2 back = swapped(v[i]);
            if (object_gradient) add(object_gradient + seen + t + TX * i, conj_times(lit[t + TX * i], back));
            if (light_gradient) total[i] = total[i] + conj_times(object[seen + t + TX * i], back);
        }
        if (object_curvature) {
            const float bright = scale[rows[b]];
#pragma unroll
            for (int i = 0; i < EX; ++i) {
                const float2 here = lit[t + TX * i], there = object[seen + t + TX * i];
                atomicAdd(object_curvature + seen + t + TX * i, bright * dot(here, here));
                seen_power[i] += bright * dot(there, there);
            }
        }
        if (own && light_gradient) {
#pragma unroll
            for (int i = 0; i < EX; ++i) {
                light_gradient[(long long)b * own + in_light + t + TX * i] = total[i];
                total[i] = make_float2(0, 0);
            }
        }
    }
    if (!own && light_gradient)
#pragma unroll
        for (int i = 0; i < EX; ++i) add(light_gradient + in_light + t + TX * i, total[i]);
    if (object_curvature && light_curvature && m == 0)
#pragma unroll
        for (int i = 0; i < EX; ++i) atomicAdd(light_curvature + in_light + t + TX * i, seen_power[i]);
}

// sums[b, m, block, 5]: with a = light d object, p = object d light and c the wave transformed back: |a|^2, |p|^2, Re conj(a) p,
// Re conj(a) c, Re conj(p) c; those of p are 0 without FITTED_LIGHT.
extern "C" __global__ void __launch_bounds__(ROW_THREADS) rows_products(
    float *sums, const float2 *wave, const float2 *object, const float2 *d_object, const long long *corner, const float2 *light,
    const float2 *d_light, int width, int modes, int own, int d_own) {
    __shared__ float2 shared[ROWS * pitch_of(NX)];
    __shared__ float parts[ROW_THREADS / 32][5];
    const Row at(shared, modes);
    const long long seen = (corner[2 * at.b] + at.y) * width + corner[2 * at.b + 1];
    const int in_light = (at.m * NY + at.y) * NX;
    const float2 *lit = light + (long long)at.b * own + in_light, *in = wave + ((long long)blockIdx.y * NY + at.y) * NX;
    float2 v[EX];
#pragma unroll
    for (int i = 0; i < EX; ++i) v[i] = swapped(in[at.t + TX * i]);
    transform<NX>(v, at.t, at.line);
    float total[5] = {0, 0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < EX; ++i) {
        const float2 c = swapped(v[i]), a = lit[at.t + TX * i] * d_object[seen + at.t + TX * i];
        total[0] += dot(a, a), total[3] += dot(a, c);
#if FITTED_LIGHT
        const float2 p = d_light[(long long)at.b * d_own + in_light + at.t + TX * i] * object[seen + at.t + TX * i];
        total[1] += dot(p, p), total[2] += dot(a, p), total[4] += dot(p, c);
#endif
    }
#pragma unroll
    for (int k = 0; k < 5; ++k) {
        total[k] = warp_sum(total[k]);
        if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32][k] = total[k];
    }
    __syncthreads();
    if (threadIdx.x < 5) {
        float sum = 0;
        for (int warp = 0; warp < ROW_THREADS / 32; ++warp) sum += parts[warp][threadIdx.x];
        sums[((long long)blockIdx.y * gridDim.x + blockIdx.x) * 5 + threadIdx.x] = sum;
    }
}
