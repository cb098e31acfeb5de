// Transforms of lines that lie side by side in shared memory, [length][PITCH] numbers: in place, radix after radix (Gentleman and Sande
// 1966), so that results lie in the order of reversed digits. The first pass gets its numbers from a function, the last one hands them
// to one: neither makes a way through shared memory of its own. Forward, not scaled; lines of swapped numbers are transformed back.
__device__ __forceinline__ float2 operator+(float2 a, float2 b) { return make_float2(a.x + b.x, a.y + b.y); }
__device__ __forceinline__ float2 operator-(float2 a, float2 b) { return make_float2(a.x - b.x, a.y - b.y); }
__device__ __forceinline__ float2 operator*(float2 a, float2 b) { return make_float2(a.x * b.x - a.y * b.y, a.x * b.y + a.y * b.x); }
__device__ __forceinline__ float2 operator*(float a, float2 b) { return make_float2(a * b.x, a * b.y); }
__device__ __forceinline__ float2 swapped(float2 a) { return make_float2(a.y, a.x); }
__device__ __forceinline__ float2 conj(float2 a) { return make_float2(a.x, -a.y); }
__device__ __forceinline__ float2 times_i(float2 a) { return make_float2(-a.y, a.x); }

__host__ __device__ constexpr int radix_of(int length) {  // of the first pass
    const int radices[] = {8, 4, 2, 13, 11, 7, 5, 3};
    for (int i = 0; i < 8; ++i)
        if (length % radices[i] == 0) return radices[i];
    return length;
}
__host__ __device__ constexpr int last_radix_of(int length) {
    while (radix_of(length) < length) length /= radix_of(length);
    return length;
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
            odd = odd + (turn <= R / 2 ? sine[near - 1] : -sine[near - 1]) * difference[j];
        }
        v[k] = make_float2(even.x + odd.y, even.y - odd.x);  // even - i odd
        v[R - k] = make_float2(even.x - odd.y, even.y + odd.x);
    }
}

template <int R> __device__ __forceinline__ void dft(float2 (&v)[R]) {
    if constexpr (R == 2) {
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
    } else {
        static_assert(R == 13, "lengths with larger prime factors are left to others");
        const float c[] = {0.88545602565320991f, 0.56806474673115592f, 0.12053668025532301f, -0.35460488704253545f, -0.74851074817110119f, -0.97094181742605201f};
        const float s[] = {0.46472317204376851f, 0.82298386589365635f, 0.99270887409805397f, 0.93501624268541483f, 0.66312265824079519f, 0.23931566428755768f};
        dft_odd<R>(v, c, s);
    }
}

// Which number of a transform of LENGTH lies at a place after all passes, and where number k lies.
template <int LENGTH> __device__ __forceinline__ int number_at(int place) {
    constexpr int R = radix_of(LENGTH), Q = LENGTH / R;
    if constexpr (Q == 1) return place;
    else return place / Q + R * number_at<Q>(place % Q);
}
template <int LENGTH> __device__ __forceinline__ int place_of(int k) {
    constexpr int R = radix_of(LENGTH), Q = LENGTH / R;
    if constexpr (Q == 1) return k;
    else return k % R * Q + place_of<Q>(k / R);
}

// A block of THREADS transforms WIDTH lines of LENGTH; roots[j] = exp(-2 pi i j / P), P a multiple of LENGTH.
// get(v, n, apart): make v[r] number n + r apart of this thread's line, without branches, so that loads are under way together;
// put(v, k, apart): v[r] is number k + r apart. FROM_TILE, TO_TILE: the numbers are in shared memory, or stay there.
template <int LENGTH, int WIDTH, int PITCH, bool FROM_TILE, bool TO_TILE, int BLOCK = LENGTH, class Get, class Put>
__device__ __forceinline__ void transform(float2 *tile, const float2 *__restrict__ roots, Get get, Put put) {
    constexpr int R = radix_of(BLOCK), Q = BLOCK / R, WORKERS = THREADS / WIDTH;
    constexpr bool BEGINS = BLOCK == LENGTH, ENDS = BLOCK == R;
    float2 *const line = tile + threadIdx.x % WIDTH;
    for (int u = threadIdx.x / WIDTH; u < LENGTH / R; u += WORKERS) {
        const int q = u % Q, base = u / Q * BLOCK + q;
        float2 v[R];
        if constexpr (BEGINS && !FROM_TILE) {
            get(v, base, Q);
        } else {
#pragma unroll
            for (int r = 0; r < R; ++r) v[r] = line[(base + r * Q) * PITCH];
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
        if constexpr (ENDS && !TO_TILE) {
            put(v, number_at<LENGTH>(base), LENGTH / R);
        } else {
#pragma unroll
            for (int r = 0; r < R; ++r) line[(base + r * Q) * PITCH] = v[r];
        }
    }
    if constexpr (!ENDS || TO_TILE) __syncthreads();
    if constexpr (!ENDS) {
        transform<LENGTH, WIDTH, PITCH, true, TO_TILE, Q>(tile, roots, get, put);
    }
}
