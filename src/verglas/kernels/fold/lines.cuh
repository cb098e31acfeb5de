// Transforms of lines in shared memory, of lengths that are products of 2, 3, 5 and 7: Stockham's, a radix of up to 15 a stage. A
// stage reads what its threads work on into registers, and writes it back to the same memory once all have read. A thread works on
// one line, so that the places of its numbers are a constant apart.
#define ALWAYS __device__ __forceinline__

ALWAYS float2 operator+(float2 a, float2 b) { return make_float2(a.x + b.x, a.y + b.y); }
ALWAYS float2 operator-(float2 a, float2 b) { return make_float2(a.x - b.x, a.y - b.y); }
ALWAYS float2 operator*(float2 a, float2 b) { return make_float2(a.x * b.x - a.y * b.y, a.x * b.y + a.y * b.x); }
ALWAYS float2 operator*(float a, float2 b) { return make_float2(a * b.x, a * b.y); }
ALWAYS float2 conjugate(float2 a) { return make_float2(a.x, -a.y); }
ALWAYS float2 swapped(float2 a) { return make_float2(a.y, a.x); }  // between two of these a forward transform is an inverse one
ALWAYS float2 minus_i(float2 a) { return make_float2(a.y, -a.x); }

// Forward transform of R numbers in place, results in order.
template <int R> struct Dft;
template <> struct Dft<2> {
    static ALWAYS void run(float2 *v) {
        const float2 a = v[0], b = v[1];
        v[0] = a + b, v[1] = a - b;
    }
};
template <> struct Dft<4> {
    static ALWAYS void run(float2 *v) {
        const float2 ac = v[0] + v[2], ca = v[0] - v[2], bd = v[1] + v[3], db = minus_i(v[1] - v[3]);
        v[0] = ac + bd, v[1] = ca + db, v[2] = ac - bd, v[3] = ca - db;
    }
};
template <int R> struct Odd {  // pairs r and R - r share their products; c, s: of 2 pi i / R
    static ALWAYS void run(float2 *v, const float *c, const float *s) {
        float2 sum[R / 2 + 1], difference[R / 2 + 1], out[R];
        out[0] = v[0];
#pragma unroll
        for (int r = 1; r <= R / 2; ++r) {
            sum[r] = v[r] + v[R - r], difference[r] = minus_i(v[r] - v[R - r]);
            out[0] = out[0] + sum[r];
        }
#pragma unroll
        for (int k = 1; k <= R / 2; ++k) {
            float2 even = v[0] + c[k] * sum[1], odd = s[k] * difference[1];
#pragma unroll
            for (int r = 2; r <= R / 2; ++r) {
                const int turns = r * k % R;
                even = even + c[turns] * sum[r];
                odd = odd + s[turns] * difference[r];
            }
            out[k] = even + odd, out[R - k] = even - odd;
        }
#pragma unroll
        for (int k = 0; k < R; ++k) v[k] = out[k];
    }
};
template <> struct Dft<3> {
    static ALWAYS void run(float2 *v) {
        constexpr float S = 0.86602540378443865f;
        const float2 sum = v[1] + v[2], difference = minus_i(v[1] - v[2]);
        const float2 even = make_float2(v[0].x - 0.5f * sum.x, v[0].y - 0.5f * sum.y);
        v[0] = v[0] + sum;
        v[1] = make_float2(even.x + S * difference.x, even.y + S * difference.y);
        v[2] = make_float2(even.x - S * difference.x, even.y - S * difference.y);
    }
};
template <> struct Dft<5> {
    static ALWAYS void run(float2 *v) {
        constexpr float C1 = 0.30901699437494742f, C2 = -0.80901699437494742f, S1 = 0.95105651629515357f, S2 = 0.58778525229247313f;
        const float c[5] = {1, C1, C2, C2, C1}, s[5] = {0, S1, S2, -S2, -S1};
        Odd<5>::run(v, c, s);
    }
};
template <> struct Dft<7> {
    static ALWAYS void run(float2 *v) {
        constexpr float C1 = 0.62348980185873353f, C2 = -0.22252093395631440f, C3 = -0.90096886790241913f;
        constexpr float S1 = 0.78183148246802981f, S2 = 0.97492791218182361f, S3 = 0.43388373911755812f;
        const float c[7] = {1, C1, C2, C3, C3, C2, C1}, s[7] = {0, S1, S2, S3, -S3, -S2, -S1};
        Odd<7>::run(v, c, s);
    }
};
template <int A, int B> struct Coprime {  // A x B without factors between (Good & Thomas)
    static ALWAYS void run(float2 *v) {
        float2 found[A][B];
#pragma unroll
        for (int i = 0; i < A; ++i) {
#pragma unroll
            for (int j = 0; j < B; ++j) found[i][j] = v[(B * i + A * j) % (A * B)];
            Dft<B>::run(found[i]);
        }
#pragma unroll
        for (int j = 0; j < B; ++j) {
            float2 line[A];
#pragma unroll
            for (int i = 0; i < A; ++i) line[i] = found[i][j];
            Dft<A>::run(line);
#pragma unroll
            for (int i = 0; i < A; ++i) found[i][j] = line[i];
        }
#pragma unroll
        for (int k = 0; k < A * B; ++k) v[k] = found[k % A][k % B];
    }
};
template <> struct Dft<6> : Coprime<2, 3> {};
template <> struct Dft<10> : Coprime<2, 5> {};
template <> struct Dft<12> : Coprime<4, 3> {};
template <> struct Dft<14> : Coprime<2, 7> {};
template <> struct Dft<15> : Coprime<3, 5> {};
template <> struct Dft<8> {  // evens and odds, then pairs
    static ALWAYS void run(float2 *v) {
        constexpr float H = 0.70710678118654752f;
        float2 e[4], o[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) e[i] = v[2 * i], o[i] = v[2 * i + 1];
        Dft<4>::run(e);
        Dft<4>::run(o);
        o[1] = make_float2(H * (o[1].x + o[1].y), H * (o[1].y - o[1].x));
        o[2] = minus_i(o[2]);
        o[3] = make_float2(H * (o[3].y - o[3].x), -H * (o[3].x + o[3].y));
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] = e[i] + o[i], v[i + 4] = e[i] - o[i];
    }
};
template <> struct Dft<9> {  // 3 x 3
    static ALWAYS void run(float2 *v) {
        const float2 w[5] = {{1, 0}, {0.76604444311897804f, -0.64278760968653933f}, {0.17364817766693035f, -0.98480775301220806f},
                             {-0.5f, -0.86602540378443865f}, {-0.93969262078590838f, -0.34202014332566873f}};
        float2 u[3][3];
#pragma unroll
        for (int a = 0; a < 3; ++a) {
#pragma unroll
            for (int b = 0; b < 3; ++b) u[a][b] = v[a + 3 * b];
            Dft<3>::run(u[a]);
#pragma unroll
            for (int b = 1; b < 3; ++b) u[a][b] = u[a][b] * w[a * b];
        }
#pragma unroll
        for (int b = 0; b < 3; ++b) {
            float2 line[3] = {u[0][b], u[1][b], u[2][b]};
            Dft<3>::run(line);
#pragma unroll
            for (int c = 0; c < 3; ++c) v[b + 3 * c] = line[c];
        }
    }
};

constexpr __host__ __device__ bool is_radix(int n) { return (n >= 2 && n <= 10) || n == 12 || n == 14 || n == 15; }
constexpr __host__ __device__ int stages_of(int n, int most) {  // with radices of up to `most`
    if (n == 1) return 0;
    int fewest = 100;
    for (int radix = most; radix > 1; --radix)
        if (is_radix(radix) && n % radix == 0) {
            const int found = 1 + stages_of(n / radix, radix);  // falling ones: no order of theirs is tried twice
            if (found < fewest) fewest = found;
        }
    return fewest;
}
constexpr __host__ __device__ int largest_radix(int n) {  // as small as the fewest stages allow
    int most = 2;
    while (most < 15 && stages_of(n, most) > stages_of(n, 15)) ++most;
    return most;
}
// Odd ones first: the first stages write far apart, and even distances meet in the same banks.
constexpr __host__ __device__ int radix_of(int rest) {
    const int most = largest_radix(rest);
    for (int odd = 1; odd >= 0; --odd)
        for (int radix = most; radix > 1; --radix)
            if (is_radix(radix) && rest % radix == 0 && (radix % 2 == odd || radix == rest) &&
                1 + stages_of(rest / radix, most) == stages_of(rest, most))
                return radix;
    return rest;
}

// L lines of N numbers, side by side (columns), or one after the other (rows). The thread's numbers are `first` of its line, which
// `mine` points to, and every STEP-th from there on, each STEP * GAP further in memory.
template <int N, int L, bool ROWS> struct Lines {
    static_assert(THREADS % L == 0, "as many threads for each line");
    static constexpr int STEP = THREADS / L, GAP = ROWS ? 1 : L, TURNS = (N + STEP - 1) / STEP;
    static ALWAYS int line() { return ROWS ? threadIdx.x / STEP : threadIdx.x % L; }
    static ALWAYS int first() { return ROWS ? threadIdx.x % STEP : threadIdx.x / L; }
    static ALWAYS float2 *start(float2 *shared) { return shared + (ROWS ? line() * (N + 1) : line()); }  // of the line
    static ALWAYS float2 *mine(float2 *shared) { return ROWS ? start(shared) + first() : shared + threadIdx.x; }
};

// A stage of the transforms of L lines; turns: exp(-2 pi i j / OF) for j < OF, a multiple of N; DONE: product of the radices before.
template <int N, int L, bool ROWS, int OF, int DONE = 1>
__device__ __forceinline__ void transform(float2 *shared, const float2 *__restrict__ turns) {
    typedef Lines<N, L, ROWS> Here;
    constexpr int R = radix_of(N / DONE), EACH = N / R, TURNS = (EACH + Here::STEP - 1) / Here::STEP, GAP = Here::GAP;
    const float2 *from = Here::mine(shared);
    float2 v[TURNS][R];
#pragma unroll
    for (int q = 0; q < TURNS; ++q) {
        const int j = Here::first() + q * Here::STEP;
        if (EACH % Here::STEP == 0 || j < EACH) {
#pragma unroll
            for (int r = 0; r < R; ++r) v[q][r] = from[(q * Here::STEP + r * EACH) * GAP];
            if (DONE > 1) {
                float2 w[R];
                w[1] = turns[j % DONE * (OF / (DONE * R))];
#pragma unroll
                for (int r = 2; r < R; ++r) w[r] = w[r / 2] * w[r - r / 2];
#pragma unroll
                for (int r = 1; r < R; ++r) v[q][r] = v[q][r] * w[r];
            }
            Dft<R>::run(v[q]);
        }
    }
    __syncthreads();  // what was read before has been read by all
#pragma unroll
    for (int q = 0; q < TURNS; ++q) {
        const int j = Here::first() + q * Here::STEP;
        if (EACH % Here::STEP == 0 || j < EACH) {
            float2 *to = Here::start(shared) + (j / DONE * DONE * R + j % DONE) * GAP;
#pragma unroll
            for (int r = 0; r < R; ++r) to[r * DONE * GAP] = v[q][r];
        }
    }
    __syncthreads();
    if constexpr (DONE * R < N) transform<N, L, ROWS, OF, DONE * R>(shared, turns);
}
