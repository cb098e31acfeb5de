// Runs kernels whose blocks are single warps on the CPU: every lane is a coroutine that stops where the warp meets. For tests.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __shared__ static

struct int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct Index { int x, y; };
inline int2 make_int2(int x, int y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
using std::abs;
using std::max;
using std::min;
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float a) { return 1 / std::sqrt(a); }
inline void atomicAdd(float *target, float value) { *target += value; }

static Index threadIdx, blockIdx, blockDim, gridDim;
static ucontext_t scheduler, lanes[32];
static unsigned votes, ballot;  // of this meeting so far; of the last one
static bool done[32];

inline unsigned __ballot_sync(unsigned, bool vote) {
    const int lane = threadIdx.x;
    votes |= unsigned(vote) << lane;
    swapcontext(&lanes[lane], &scheduler);
    return ballot;
}
inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline void __syncwarp() { __ballot_sync(0, false); }

template <class Function> static Function *running;
template <class Function> static void lane_main(int lane) {
    (*running<Function>)();
    done[lane] = true;
}

// All lanes of one block, from meeting to meeting.
template <class Function> void run_warp(Function function) {
    static std::vector<char> stacks(32 << 16);
    running<Function> = &function;
    for (int lane = 0; lane < 32; ++lane) {
        done[lane] = false;
        getcontext(&lanes[lane]);
        lanes[lane].uc_stack = {.ss_sp = &stacks[lane << 16], .ss_flags = 0, .ss_size = 1 << 16};
        lanes[lane].uc_link = &scheduler;
        makecontext(&lanes[lane], (void (*)())lane_main<Function>, 1, lane);
    }
    for (bool busy = true; busy;) {
        busy = false;
        votes = 0;
        for (int lane = 0; lane < 32; ++lane) {
            if (done[lane]) std::abort();  // some lanes ended, others still meet
            threadIdx.x = lane;
            swapcontext(&scheduler, &lanes[lane]);
            busy |= !done[lane];
        }
        ballot = votes;
    }
}
