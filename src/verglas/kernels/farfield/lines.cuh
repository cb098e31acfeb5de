// What the kernels of farfield.cu have in common: a line of a window is transformed by its threads in registers, which meet in shared
// memory. Compile with NY, NX (32 to 1024, powers of two), COUNTS (type of a count), FITTED_LIGHT (whether a step
// changes the light) and MOVED: light is [modes, NY, NX], the same for all positions, or by `columns_light` [positions, modes, NY, NX],
// moved by fractions of a pixel, its rows still transformed; CURVATURE: whether `rows_back` adds curvatures up.
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
#ifndef MOVED
#define MOVED 0
#endif
#ifndef CURVATURE
#define CURVATURE 0
#endif

__host__ __device__ constexpr int elements_of(int n) { return n >= 128 ? 16 : 8; }  // of a line that a thread holds
__host__ __device__ constexpr int lines_of(int threads, int others) { return 256 / threads < others ? 256 / threads : others; }
__host__ __device__ constexpr int pitch_of(int n) { return n + n / 16 + 1; }  // of a line in shared memory: no two threads in a bank

constexpr int EX = elements_of(NX), TX = NX / EX, ROWS = lines_of(TX, NY), ROW_THREADS = TX * ROWS;
constexpr int EY = elements_of(NY), COLUMNS = lines_of(NY / EY, NX), COLUMN_THREADS = NY / EY * COLUMNS;
constexpr int EA = 8, ALONG = lines_of(NY / EA, NX), ALONG_THREADS = NY / EA * ALONG;  // fewer, where three waves are held at once
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
template <int N, int E, int R, int DONE> __device__ __forceinline__ void stage(float2 *v, int t, float2 *line) {
    constexpr int T = N / E, APART = E / R;
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

// Transform, not scaled, of a line of N numbers, E to a thread; called by all threads of a block.
template <int N, int E, int DONE = 1> __device__ __forceinline__ void transform(float2 *v, int t, float2 *line) {
    constexpr int R = N / DONE < E ? N / DONE : E;
    stage<N, E, R, DONE>(v, t, line);
    if constexpr (DONE * R < N) transform<N, E, DONE * R>(v, t, line);
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

// A row of light.
__device__ __forceinline__ void load_light(
    float2 *v, const float2 *light, int b, int m, int modes, int y, int t, float2 *line) {
    const float2 *row = light + (((MOVED ? (long long)b * modes : 0) + m) * NY + y) * NX;
#pragma unroll
    for (int i = 0; i < EX; ++i) v[i] = MOVED ? swapped(row[t + TX * i]) : row[t + TX * i];
    if (!MOVED) return;
    transform<NX, EX>(v, t, line);
#pragma unroll
    for (int i = 0; i < EX; ++i) v[i] = swapped(v[i]);
}
__device__ __forceinline__ void load_light(float2 *v, const float2 *light, const Row &at, int modes) {
    load_light(v, light, at.b, at.m, modes, at.y, at.t, at.line);
}

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

// Where a thread of a block of C columns stands, E numbers of one to a thread: block = (columns, position).
template <int E, int C> struct Column {
    static constexpr int T = NY / E;
    int t, x, b;
    float2 *line;
    __device__ Column(float2 *shared) {
        t = threadIdx.x / C;
        x = blockIdx.x * C + threadIdx.x % C;
        b = blockIdx.y;
        line = shared + threadIdx.x % C * pitch_of(NY);
    }
    __device__ __forceinline__ int pixel(int i) const { return (t + T * i) * NX + x; }  // of number i of the thread
    __device__ __forceinline__ void load(float2 *v, const float2 *wave, long long plane) const {  // and transform
#pragma unroll
        for (int i = 0; i < E; ++i) v[i] = wave[plane * (NY * NX) + pixel(i)];
        transform<NY, E>(v, t, line);
    }
};

// sqrt, to the last digits but one; of what is not positive as of 1e-30.
__device__ __forceinline__ float root_of(float a) { return fmaxf(a, 1e-30f) * rsqrtf(fmaxf(a, 1e-30f)); }
