// Transforms of lines that lie side by side in shared memory: in place, radix after radix (Gentleman and Sande 1966), so that results
// lie in the order of reversed digits. The first pass gets its numbers from a function, the last one hands them to one: neither makes
// a way through shared memory of its own. A radix of several factors is a transform in registers: by the Chinese remainder theorem
// where the factors have none in common (Good 1958), else as Cooley and Tukey (1965). Forward, not scaled; lines of swapped numbers
// are transformed back.
__device__ __forceinline__ float2 operator+(float2 a, float2 b) { return make_float2(a.x + b.x, a.y + b.y); }
__device__ __forceinline__ float2 operator-(float2 a, float2 b) { return make_float2(a.x - b.x, a.y - b.y); }
__device__ __forceinline__ float2 operator*(float2 a, float2 b) { return make_float2(a.x * b.x - a.y * b.y, a.x * b.y + a.y * b.x); }
__device__ __forceinline__ float2 operator*(float a, float2 b) { return make_float2(a * b.x, a * b.y); }
__device__ __forceinline__ float2 swapped(float2 a) { return make_float2(a.y, a.x); }
__device__ __forceinline__ float2 conj(float2 a) { return make_float2(a.x, -a.y); }
__device__ __forceinline__ float2 times_i(float2 a) { return make_float2(-a.y, a.x); }

__host__ __device__ constexpr double series(double angle, bool cosine) {  // 0 <= angle < pi / 2
    double term = cosine ? 1 : angle, sum = term;
    for (int i = cosine ? 1 : 2; i < 24; i += 2) term *= -angle * angle / (i * (i + 1)), sum += term;
    return sum;
}

// exp(-2 pi i K / N) a.
template <int K, int N> __device__ __forceinline__ float2 turned(float2 a) {
    constexpr int quarter = 4 * K / N % 4, rest = 4 * K % N;
    if constexpr (rest != 0) {
        constexpr float c = series(1.57079632679489662 * rest / N, true), s = series(1.57079632679489662 * rest / N, false);
        a = make_float2(c * a.x + s * a.y, c * a.y - s * a.x);
    }
    if constexpr (quarter == 1) return make_float2(a.y, -a.x);
    if constexpr (quarter == 2) return make_float2(-a.x, -a.y);
    if constexpr (quarter == 3) return make_float2(-a.y, a.x);
    return a;
}

__device__ __forceinline__ void dft4(float2 &a, float2 &b, float2 &c, float2 &d) {
    const float2 ac = a + c, ca = a - c, bd = b + d, db = make_float2((b - d).y, (d - b).x);  // -i (b - d)
    a = ac + bd;
    c = ac - bd;
    b = ca + db;
    d = ca - db;
}

template <int R> __device__ __forceinline__ void dft_odd(float2 (&v)[R], const float *cosine, const float *sine) {
    float2 sum[R], difference[R];
#pragma unroll
    for (int j = 1; j <= R / 2; ++j) sum[j] = v[j] + v[R - j], difference[j] = v[j] - v[R - j];
    const float2 first = v[0];
#pragma unroll
    for (int j = 1; j <= R / 2; ++j) v[0] = v[0] + sum[j];
#pragma unroll
    for (int k = 1; k <= R / 2; ++k) {
        float2 even = first, odd = make_float2(0, 0);
#pragma unroll
        for (int j = 1; j <= R / 2; ++j) {
            const int turn = j * k % R, near = turn <= R / 2 ? turn : R - turn;
            even = even + cosine[near - 1] * sum[j];
            odd = j == 1 ? sine[near - 1] * difference[j] : odd + (turn <= R / 2 ? sine[near - 1] : -sine[near - 1]) * difference[j];
        }
        v[k] = make_float2(even.x + odd.y, even.y - odd.x);  // even - i odd
        v[R - k] = make_float2(even.x - odd.y, even.y + odd.x);
    }
}

__host__ __device__ constexpr int first_factor_of(int length) {  // the part of its smallest prime; of a power of one, its half
    int prime = 2, power = 1, exponent = 0;
    while (length % prime) ++prime;
    for (int left = length; left % prime == 0; left /= prime) power *= prime, ++exponent;
    if (power < length) return power;
    power = 1;
    for (int i = 0; i < exponent / 2; ++i) power *= prime;
    return power;
}
__host__ __device__ constexpr int inverse_of(int a, int modulus) {
    for (int i = 1; i < modulus; ++i)
        if (a * i % modulus == 1) return i;
    return 0;
}

template <int R> __device__ __forceinline__ void dft(float2 (&v)[R]);

template <int R, int N, int A, int I = 1> __device__ __forceinline__ void turn(float2 (&a)[A]) {  // a[i] turned i N / R times
    if constexpr (I < A) {
        a[I] = turned<I * N % R, R>(a[I]);
        turn<R, N, A, I + 1>(a);
    }
}

// The transforms of A numbers of each of B columns: [k, column].
template <int R, int A, bool APART, int N = 0> __device__ __forceinline__ void dft_columns(const float2 (&v)[R], float2 (&found)[R]) {
    constexpr int B = R / A;
    if constexpr (N < B) {
        float2 a[A];
#pragma unroll
        for (int i = 0; i < A; ++i) a[i] = v[(B * i + (APART ? A : 1) * N) % R];
        dft<A>(a);
        if constexpr (!APART) turn<R, N, A>(a);
#pragma unroll
        for (int i = 0; i < A; ++i) found[i * B + N] = a[i];
        dft_columns<R, A, APART, N + 1>(v, found);
    }
}

template <int R> __device__ __forceinline__ void dft(float2 (&v)[R]) {
    if constexpr (R == 1) {
        return;
    } else if constexpr (R == 2) {
        const float2 a = v[0];
        v[0] = a + v[1], v[1] = a - v[1];
    } else if constexpr (R == 4) {
        dft4(v[0], v[1], v[2], v[3]);
    } else if constexpr (R == 8) {
        constexpr float H = 0.70710678118654752f;
        float2 e[4], o[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) e[i] = v[2 * i], o[i] = v[2 * i + 1];
        dft4(e[0], e[1], e[2], e[3]);
        dft4(o[0], o[1], o[2], o[3]);
        o[1] = make_float2(H * (o[1].x + o[1].y), H * (o[1].y - o[1].x));
        o[2] = make_float2(o[2].y, -o[2].x);
        o[3] = make_float2(H * (o[3].y - o[3].x), -H * (o[3].x + o[3].y));
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] = e[i] + o[i], v[i + 4] = e[i] - o[i];
    } else if constexpr (R == 3) {
        const float c[] = {-0.5f}, s[] = {0.86602540378443865f};
        dft_odd<R>(v, c, s);
    } else if constexpr (R == 5) {
        const float c[] = {0.30901699437494742f, -0.80901699437494742f}, s[] = {0.95105651629515357f, 0.58778525229247313f};
        dft_odd<R>(v, c, s);
    } else if constexpr (R == 7) {
        const float c[] = {0.62348980185873353f, -0.22252093395631440f, -0.90096886790241913f};
        const float s[] = {0.78183148246802981f, 0.97492791218182361f, 0.43388373911755812f};
        dft_odd<R>(v, c, s);
    } else if constexpr (R == 11) {
        const float c[] = {0.84125353283118121f, 0.41541501300188644f, -0.14231483827328500f, -0.65486073394528499f, -0.95949297361449737f};
        const float s[] = {0.54064081745559756f, 0.90963199535451833f, 0.98982144188093280f, 0.75574957435425827f, 0.28173255684142967f};
        dft_odd<R>(v, c, s);
    } else if constexpr (R == 13) {
        const float c[] = {0.88545602565320991f, 0.56806474673115592f, 0.12053668025532301f, -0.35460488704253545f,
                           -0.74851074817110119f, -0.97094181742605201f};
        const float s[] = {0.46472317204376851f, 0.82298386589365635f, 0.99270887409805397f, 0.93501624268541483f,
                           0.66312265824079519f, 0.23931566428755768f};
        dft_odd<R>(v, c, s);
    } else {
        constexpr int A = first_factor_of(R), B = R / A, of_b = inverse_of(B, A), of_a = inverse_of(A, B);
        static_assert(A > 1, "lengths with larger prime factors are left to others");
        constexpr bool apart = of_a != 0 && of_b != 0;  // no common factor
        float2 found[R];
        dft_columns<R, A, apart>(v, found);
#pragma unroll
        for (int k = 0; k < A; ++k) {
            float2 b[B];
#pragma unroll
            for (int i = 0; i < B; ++i) b[i] = found[k * B + i];
            dft<B>(b);
#pragma unroll
            for (int i = 0; i < B; ++i) v[apart ? (B * of_b * k + A * of_a * i) % R : k + A * i] = b[i];
        }
    }
}

// The passes of a transform, by their radices. In shared memory one number is left free after each part of an even length that a pass
// leaves to the next ones, so that threads of which each has one such part do not meet in a bank.
template <int... RADICES> struct Radices {
    static constexpr int count = sizeof...(RADICES), length = (1 * ... * RADICES);
    __host__ __device__ static constexpr int radix(int pass) {
        const int radices[] = {RADICES...};
        return radices[pass];
    }
    __host__ __device__ static constexpr int block(int pass) {
        int product = 1;
        for (int i = pass; i < count; ++i) product *= radix(i);
        return product;
    }
    // Where number n lies; also how far those are apart that are n, the block of a pass, apart.
    template <int PASS = 1> __host__ __device__ __forceinline__ static constexpr int place(int n) {
        if constexpr (PASS >= count) return n;
        else return place<PASS + 1>(n) + (block(PASS) % 2 ? 0 : n / block(PASS));
    }
    // Which number of the transform comes first in the last pass's block u.
    template <int PASS = 0> __device__ __forceinline__ static int number(int u) {
        if constexpr (PASS >= count - 1) {
            return 0;
        } else {
            constexpr int others = block(PASS + 1) / radix(count - 1);
            return u / others + radix(PASS) * number<PASS + 1>(u % others);
        }
    }
    // Where number k of the transform lies after the last pass, if that leaves it there.
    template <int PASS = 0> __device__ __forceinline__ static int unsorted(int k) {
        if constexpr (PASS >= count - 1) return k;
        else return k % radix(PASS) * block(PASS + 1) + unsorted<PASS + 1>(k / radix(PASS));
    }
};
template <int... RADICES> struct Passes : Radices<RADICES...> {
    using Of = Radices<RADICES...>;
    static constexpr int first = Of::radix(0), last = Of::radix(Of::count - 1), room = Of::place(Of::length - 1) + 1;
};

// TEAM threads transform a line, of which number n lies at line[place(n) STRIDE]; roots[j] = exp(-2 pi i j / P), P a multiple of
// the length. get(v, n, apart): make v[r] number n + r apart of the line; put(v, k, apart): v[r] is number k + r apart; STAYS: numbers
// remain in shared memory, where `unsorted` tells. Those who have no line come along, as blocks meet.
template <class Plan, int TEAM, int STRIDE, bool STAYS = false, int PASS = 0, class Get, class Put>
__device__ __forceinline__ void transform(float2 *line, int worker, const float2 *__restrict__ roots, Get get, Put put) {
    constexpr int R = Plan::radix(PASS), BLOCK = Plan::block(PASS), Q = BLOCK / R, UNITS = Plan::length / R;
    constexpr bool BEGINS = PASS == 0, ENDS = PASS == Plan::count - 1;
    constexpr int APART = Plan::place(Q) * STRIDE;
    for (int u = worker; u < UNITS; u += TEAM) {
        const int q = u % Q, base = u / Q * BLOCK + q;
        float2 *const own = line + Plan::place(base) * STRIDE;
        float2 v[R];
        if constexpr (BEGINS) {
            get(v, base, Q);
        } else {
#pragma unroll
            for (int r = 0; r < R; ++r) v[r] = own[r * APART];
        }
        dft<R>(v);
        if constexpr (!ENDS) {
            float2 root[R];
            root[1] = roots[q * (P / BLOCK)];
#pragma unroll
            for (int r = 2; r < R; ++r) root[r] = root[r / 2] * root[r - r / 2];
#pragma unroll
            for (int r = 1; r < R; ++r) v[r] = v[r] * root[r];
        }
        if constexpr (ENDS && !STAYS) {
            put(v, Plan::number(u), UNITS);
        } else {
#pragma unroll
            for (int r = 0; r < R; ++r) own[r * APART] = v[r];
        }
    }
    if constexpr (!ENDS || STAYS) __syncthreads();
    if constexpr (!ENDS) transform<Plan, TEAM, STRIDE, STAYS, PASS + 1>(line, worker, roots, get, put);
}
