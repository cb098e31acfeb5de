// Far fields on the GPU in few walks through memory: see README.md.
#include "lines.cuh"

// wave[b, m] = rows of object x light, transformed.
extern "C" __global__ void __launch_bounds__(ROW_THREADS) rows_forward(
    float2 *wave, const float2 *object, const long long *corner, const float2 *light, int width, int modes) {
    __shared__ float2 shared[ROWS * pitch_of(NX)];
    const Row at(shared, modes);
    const float2 *seen = object + (corner[2 * at.b] + at.y) * width + corner[2 * at.b + 1];
    float2 v[EX];
    load_light(v, light, at, modes);
#pragma unroll
    for (int i = 0; i < EX; ++i) v[i] = seen[at.t + TX * i] * v[i];
    transform<NX, EX>(v, at.t, at.line);
    float2 *out = wave + ((long long)blockIdx.y * NY + at.y) * NX;
#pragma unroll
    for (int i = 0; i < EX; ++i) out[at.t + TX * i] = v[i];
}

// first = rows of light d object + d light object, second = d light d object (FITTED_LIGHT), both transformed.
extern "C" __global__ void __launch_bounds__(ROW_THREADS) rows_step(
    float2 *first, float2 *second, const float2 *object, const float2 *d_object, const long long *corner,
    const float2 *light, const float2 *d_light, int width, int modes) {
    __shared__ float2 shared[ROWS * pitch_of(NX)];
    const Row at(shared, modes);
    const long long seen = (corner[2 * at.b] + at.y) * width + corner[2 * at.b + 1];
    float2 v[EX];
    load_light(v, light, at, modes);
#pragma unroll
    for (int i = 0; i < EX; ++i) v[i] = d_object[seen + at.t + TX * i] * v[i];
    const long long out = ((long long)blockIdx.y * NY + at.y) * NX;
#if FITTED_LIGHT
    float2 u[EX];
    load_light(u, d_light, at, modes);
#pragma unroll
    for (int i = 0; i < EX; ++i) {
        v[i] = v[i] + object[seen + at.t + TX * i] * u[i];
        u[i] = d_object[seen + at.t + TX * i] * u[i];
    }
    transform<NX, EX>(u, at.t, at.line);
#pragma unroll
    for (int i = 0; i < EX; ++i) second[out + at.t + TX * i] = u[i];
#endif
    transform<NX, EX>(v, at.t, at.line);
#pragma unroll
    for (int i = 0; i < EX; ++i) first[out + at.t + TX * i] = v[i];
}

// wave[b, m] := columns of the slope times the wave at the detector, transformed back; sums[b, block, 3]: loss, (sqrt I - sqrt n)^2, n.
extern "C" __global__ void __launch_bounds__(COLUMN_THREADS, NY <= 256 ? 3 : 2) columns_slope(
    float2 *wave, float *sums, const COUNTS *counts, const float *weight, const float *scale, const float *background,
    const long long *rows, int modes, float offset, float floor_, int poisson) {
    constexpr int WARPS = COLUMN_THREADS / 32;
    __shared__ float2 shared[COLUMNS * pitch_of(NY)];
    __shared__ float parts[WARPS][3];
    const Column<EY, COLUMNS> at(shared);
    const float unitary = rsqrtf((float)NY * NX), bright = scale[rows[at.b]];
    float2 v[EY];
    float slope[EY];
#pragma unroll
    for (int i = 0; i < EY; ++i) slope[i] = 0;
    for (int m = 0; m < modes; ++m) {
        at.load(v, wave, (long long)at.b * modes + m);
#pragma unroll
        for (int i = 0; i < EY; ++i) slope[i] += dot(v[i], v[i]);
    }
    float loss = 0, mismatch = 0, counted = 0;
#pragma unroll
    for (int i = 0; i < EY; ++i) {
        const int pixel = at.pixel(i);
        const float good = weight[pixel], n = count_of(counts, good, rows[at.b] * (NY * NX) + pixel);
        const float intensity = bright * unitary * unitary * slope[i] + background[pixel];
        const float apart = root_of(intensity) - root_of(n);
        mismatch += good * apart * apart;
        counted += good * n;
        if (poisson) {
            const float now = fmaxf(intensity, floor_);
            loss += good * (now - n + (n > 0 ? n * logf(n / now) : 0.0f));
            slope[i] = good * (1 - n / now);
        } else {
            const float raised = fmaxf(intensity + offset, floor_), inverse = rsqrtf(raised), wanted = root_of(n + offset);
            loss += good * (raised * inverse - wanted) * (raised * inverse - wanted);
            slope[i] = good * (1 - wanted * inverse);
        }
        slope[i] *= 2 * bright * unitary * unitary;
    }
    loss = warp_sum(loss), mismatch = warp_sum(mismatch), counted = warp_sum(counted);
    if (threadIdx.x % 32 == 0) {
        parts[threadIdx.x / 32][0] = loss, parts[threadIdx.x / 32][1] = mismatch, parts[threadIdx.x / 32][2] = counted;
    }
    for (int m = 0; m < modes; ++m) {
        const long long plane = (long long)at.b * modes + m;
        if (modes > 1) at.load(v, wave, plane);
#pragma unroll
        for (int i = 0; i < EY; ++i) v[i] = swapped(slope[i] * v[i]);
        transform<NY, EY>(v, at.t, at.line);
#pragma unroll
        for (int i = 0; i < EY; ++i) wave[plane * (NY * NX) + at.pixel(i)] = swapped(v[i]);
    }
    __syncthreads();
    if (threadIdx.x < 3) {
        float total = 0;
        for (int warp = 0; warp < WARPS; ++warp) total += parts[warp][threadIdx.x];
        sums[((long long)at.b * gridDim.x + blockIdx.x) * 3 + threadIdx.x] = total;
    }
}

// sums[b, block, step, 3]: misfit and two derivatives at lengths steps[0 .. count) of waves wave + t first + t^2 second.
extern "C" __global__ void __launch_bounds__(ALONG_THREADS, 2) columns_along(
    const float2 *wave, const float2 *first, const float2 *second, float *sums, const COUNTS *counts, const float *weight,
    const float *scale, const float *background, const long long *rows, const float *steps, int count, int modes,
    float offset, float floor_, int poisson) {
    constexpr int DEGREE = FITTED_LIGHT ? 4 : 2, WARPS = ALONG_THREADS / 32;
    __shared__ float2 shared[ALONG * pitch_of(NY)];
    __shared__ float parts[WARPS][3 * MOST_STEPS];
    const Column<EA, ALONG> at(shared);
    const float bright = scale[rows[at.b]] / ((float)NY * NX);
    float c[DEGREE + 1][EA];
#pragma unroll
    for (int d = 0; d <= DEGREE; ++d)
#pragma unroll
        for (int i = 0; i < EA; ++i) c[d][i] = 0;
    for (int m = 0; m < modes; ++m) {
        const long long plane = (long long)at.b * modes + m;
        float2 v[EA], u[EA];
        at.load(v, wave, plane);
        at.load(u, first, plane);
#pragma unroll
        for (int i = 0; i < EA; ++i) c[0][i] += dot(v[i], v[i]), c[1][i] += 2 * dot(v[i], u[i]), c[2][i] += dot(u[i], u[i]);
#if FITTED_LIGHT
        float2 w[EA];
        at.load(w, second, plane);
#pragma unroll
        for (int i = 0; i < EA; ++i)
            c[2][i] += 2 * dot(v[i], w[i]), c[3][i] += 2 * dot(u[i], w[i]), c[4][i] += dot(w[i], w[i]);
#endif
    }
    float n[EA], good[EA];
#pragma unroll
    for (int i = 0; i < EA; ++i) {
        const int pixel = at.pixel(i);
        good[i] = weight[pixel];
        n[i] = count_of(counts, good[i], rows[at.b] * (NY * NX) + pixel);
        if (!poisson) n[i] = root_of(n[i] + offset);
#pragma unroll
        for (int d = 0; d <= DEGREE; ++d) c[d][i] *= bright;
        c[0][i] += background[pixel];
    }
    for (int k = 0; k < count; ++k) {
        const float t = steps[k];
        float loss = 0, slope_sum = 0, bend_sum = 0;
#pragma unroll
        for (int i = 0; i < EA; ++i) {
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
    for (int j = threadIdx.x; j < 3 * count; j += ALONG_THREADS) {
        float total = 0;
        for (int warp = 0; warp < WARPS; ++warp) total += parts[warp][j];
        sums[((long long)at.b * gridDim.x + blockIdx.x) * 3 * count + j] = total;
    }
}

// Rows transformed back and spread: object += conj(light) wave by atomics; light += conj(object) wave, summed over `group` positions
// in registers, or, MOVED, written for each with its rows transformed again. With CURVATURE also sums of scale
// |object|^2. What is null is not asked for. block = (rows, group of positions and mode).
extern "C" __global__ void __launch_bounds__(ROW_THREADS, NX <= 256 ? 2 : 1) rows_back(
    float2 *object_gradient, float2 *light_gradient, float *light_curvature, const float2 *wave,
    const float2 *object, const long long *corner, const float2 *light, const float *scale, const long long *rows, int width,
    int batch, int modes, int group) {
    __shared__ float2 shared[ROWS * pitch_of(NX)];
    const int t = threadIdx.x % TX, y = blockIdx.x * ROWS + threadIdx.x / TX, m = blockIdx.y % modes;
    float2 *line = shared + threadIdx.x / TX * pitch_of(NX);
    const int in_light = (m * NY + y) * NX;
    float2 total[EX];
#pragma unroll
    for (int i = 0; i < EX; ++i) total[i] = make_float2(0, 0);
#if CURVATURE
    float seen_power[EX] = {};
#endif
    const int begin = blockIdx.y / modes * group;
    for (int b = begin; b < min(batch, begin + group); ++b) {
        float2 v[EX];
        const float2 *in = wave + (((long long)b * modes + m) * NY + y) * NX;
#pragma unroll
        for (int i = 0; i < EX; ++i) v[i] = swapped(in[t + TX * i]);
        transform<NX, EX>(v, t, line);
        const long long seen = (corner[2 * b] + y) * width + corner[2 * b + 1];
        float2 lit[EX];
        load_light(lit, light, b, m, modes, y, t, line);
#pragma unroll
        for (int i = 0; i < EX; ++i) {
            const float2 back = swapped(v[i]);
            if (object_gradient) add(object_gradient + seen + t + TX * i, conj_times(lit[i], back));
            if (light_gradient) total[i] = total[i] + conj_times(object[seen + t + TX * i], back);
        }
#if CURVATURE
        const float bright = scale[rows[b]];
#pragma unroll
        for (int i = 0; i < EX; ++i) {
            const float2 there = object[seen + t + TX * i];
            seen_power[i] += bright * dot(there, there);
        }
#endif
        if (MOVED && light_gradient) {
            transform<NX, EX>(total, t, line);
#pragma unroll
            for (int i = 0; i < EX; ++i) {
                light_gradient[(long long)b * modes * NY * NX + in_light + t + TX * i] = total[i];
                total[i] = make_float2(0, 0);
            }
        }
    }
    if (!MOVED && light_gradient)
#pragma unroll
        for (int i = 0; i < EX; ++i) add(light_gradient + in_light + t + TX * i, total[i]);
#if CURVATURE
    if (m == 0)
#pragma unroll
        for (int i = 0; i < EX; ++i) atomicAdd(light_curvature + in_light + t + TX * i, seen_power[i]);
#endif
}

// sums[b, m, block, 5]: with a = light d object, p = object d light and c the wave transformed back: |a|^2, |p|^2, Re conj(a) p,
// Re conj(a) c, Re conj(p) c; those of p are 0 without FITTED_LIGHT.
extern "C" __global__ void __launch_bounds__(ROW_THREADS) rows_products(
    float *sums, const float2 *wave, const float2 *object, const float2 *d_object, const long long *corner, const float2 *light,
    const float2 *d_light, int width, int modes) {
    __shared__ float2 shared[ROWS * pitch_of(NX)];
    __shared__ float parts[ROW_THREADS / 32][5];
    const Row at(shared, modes);
    const long long seen = (corner[2 * at.b] + at.y) * width + corner[2 * at.b + 1];
    const float2 *in = wave + ((long long)blockIdx.y * NY + at.y) * NX;
    float2 v[EX];
#pragma unroll
    for (int i = 0; i < EX; ++i) v[i] = swapped(in[at.t + TX * i]);
    transform<NX, EX>(v, at.t, at.line);
    float total[5] = {0, 0, 0, 0, 0};
    float2 lit[EX], d_lit[EX];
    load_light(lit, light, at, modes);
    if (FITTED_LIGHT) load_light(d_lit, d_light, at, modes);
#pragma unroll
    for (int i = 0; i < EX; ++i) {
        const float2 c = swapped(v[i]), a = lit[i] * d_object[seen + at.t + TX * i];
        total[0] += dot(a, a), total[3] += dot(a, c);
#if FITTED_LIGHT
        const float2 p = d_lit[i] * object[seen + at.t + TX * i];
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

// exp(-2 pi i k fraction), k: frequency of number `index` of n, in cycles over n.
__device__ __forceinline__ float2 phase_of(int index, int n, float fraction) {
    float2 out;
    sincospif(-2.0f * (index < n / 2 ? index : index - n) * fraction / n, &out.y, &out.x);
    return out;
}

// light[b, m] = columns of the light's transform, moved by the fractions of position b, transformed back. block = (columns, position).
extern "C" __global__ void __launch_bounds__(COLUMN_THREADS) columns_light(
    float2 *light, const float2 *spectrum, const float *fraction, int modes) {
    __shared__ float2 shared[COLUMNS * pitch_of(NY)];
    const Column<EY, COLUMNS> at(shared);
    const float2 column = rsqrtf((float)NY * NX) * phase_of(at.x, NX, fraction[2 * at.b + 1]);
    for (int m = 0; m < modes; ++m) {
        float2 v[EY];
#pragma unroll
        for (int i = 0; i < EY; ++i) {
            const float2 phase = phase_of(at.t + at.T * i, NY, fraction[2 * at.b]) * column;
            v[i] = swapped(spectrum[m * (NY * NX) + at.pixel(i)] * phase);
        }
        transform<NY, EY>(v, at.t, at.line);
        const long long plane = (long long)at.b * modes + m;
#pragma unroll
        for (int i = 0; i < EY; ++i) light[plane * (NY * NX) + at.pixel(i)] = swapped(v[i]);
    }
}

// The adjoint: spectrum[m] += conj(phases) columns of light[b, m], transformed; `group` positions are summed in registers.
// block = (columns, group of positions and mode).
extern "C" __global__ void __launch_bounds__(COLUMN_THREADS) columns_light_back(
    float2 *spectrum, const float2 *light, const float *fraction, int batch, int modes, int group) {
    __shared__ float2 shared[COLUMNS * pitch_of(NY)];
    const Column<EY, COLUMNS> at(shared);
    const int m = at.b % modes, begin = at.b / modes * group;
    float2 total[EY];
#pragma unroll
    for (int i = 0; i < EY; ++i) total[i] = make_float2(0, 0);
    for (int b = begin; b < min(batch, begin + group); ++b) {
        float2 v[EY];
        at.load(v, light, (long long)b * modes + m);
        const float2 column = rsqrtf((float)NY * NX) * phase_of(at.x, NX, fraction[2 * b + 1]);
#pragma unroll
        for (int i = 0; i < EY; ++i)
            total[i] = total[i] + conj_times(phase_of(at.t + at.T * i, NY, fraction[2 * b]) * column, v[i]);
    }
#pragma unroll
    for (int i = 0; i < EY; ++i) add(spectrum + m * (NY * NX) + at.pixel(i), total[i]);
}
