// Runs kernels of blocks of many threads on the CPU: every thread is a coroutine that stops where the block meets. For tests.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct int4 { int x, y, z, w; };
struct Index { int x, y, z; };
inline float2 make_float2(float x, float y) { return {x, y}; }
using std::isfinite;
using std::max;
using std::min;
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline int __float_as_int(float number) { return std::bit_cast<int>(number); }
inline float rsqrtf(float a) { return 1 / std::sqrt(a); }
inline void sincospif(float a, float *s, float *c) { *s = std::sin(M_PI * a), *c = std::cos(M_PI * a); }
inline void atomicAdd(float *target, float value) { *target += value; }

constexpr int MOST = 1024;
static Index threadIdx, blockIdx, gridDim;
static ucontext_t threads[MOST];
static jmp_buf home, meeting[MOST];  // jumps, once threads have begun: swapcontext asks the system each time
static double shown[MOST];
static bool fresh[MOST], done[MOST];

inline void __syncthreads() {
    if (!_setjmp(meeting[threadIdx.x])) _longjmp(home, 1);
}
inline float __shfl_xor_sync(unsigned, float value, int apart) {  // all threads of a block come here
    shown[threadIdx.x] = value;
    __syncthreads();
    const float other = shown[threadIdx.x ^ apart];
    __syncthreads();
    return other;
}

inline void __syncwarp() { __syncthreads(); }  // of blocks of one warp
inline double __shfl_sync(unsigned, double value, int from) {
    shown[threadIdx.x] = value;
    __syncthreads();
    const double other = shown[from];
    __syncthreads();
    return other;
}
inline double __shfl_up_sync(unsigned, double value, int apart) {
    return __shfl_sync(0, value, threadIdx.x < apart ? threadIdx.x : threadIdx.x - apart);
}
inline double __shfl_down_sync(unsigned, double value, int apart) {
    return __shfl_sync(0, value, threadIdx.x + apart < 32 ? threadIdx.x + apart : threadIdx.x);
}
inline unsigned __ballot_sync(unsigned, bool mine) {
    shown[threadIdx.x] = mine;
    __syncthreads();
    unsigned all = 0;
    for (int i = 0; i < 32; ++i) all |= (shown[i] != 0) << i;
    __syncthreads();
    return all;
}
inline int __clz(unsigned bits) { return std::countl_zero(bits); }
inline int __popc(unsigned bits) { return std::popcount(bits); }

template <class Function> static Function *running;
template <class Function> static void thread_main(int thread) {
    (*running<Function>)();
    done[thread] = true;
    _longjmp(home, 1);
}

// A thread until it meets the others.
__attribute__((noinline)) static void go_on(int thread) {
    if (_setjmp(home)) return;
    threadIdx.x = thread;
    if (fresh[thread]) {
        fresh[thread] = false;
        setcontext(&threads[thread]);
    }
    _longjmp(meeting[thread], 1);
}

// All threads of one block, from meeting to meeting.
template <class Function> void run_block(int count, Function function) {
    static std::vector<char> stacks(MOST << 15);
    running<Function> = &function;
    for (int thread = 0; thread < count; ++thread) {
        fresh[thread] = true, done[thread] = false;
        getcontext(&threads[thread]);
        threads[thread].uc_stack = {.ss_sp = &stacks[thread << 15], .ss_flags = 0, .ss_size = 1 << 15};
        makecontext(&threads[thread], (void (*)())thread_main<Function>, 1, thread);
    }
    for (bool busy = true; busy;) {
        busy = false;
        for (int thread = 0; thread < count; ++thread) {
            if (done[thread]) std::abort();  // some threads ended, others still meet
            go_on(thread);
            busy |= !done[thread];
        }
    }
}

// A whole launch.
template <class Function> void run_grid(Index grid, int count, Function function) {
    gridDim = grid;
    for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
        for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
            for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) run_block(count, function);
}
