// What lets residue.cu run on a CPU (tests/test_residue.py): a block at a time, a thread of the system for each of its threads.
#include <algorithm>
#include <barrier>
#include <cmath>
#include <thread>
#include <vector>
#define __device__
#define __restrict__

using std::min;
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(n, m)
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct int2 { int x, y; };
struct longlong2 { long long x, y; };
static float2 make_float2(float x, float y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct Index { int x, y; };
static thread_local Index blockIdx, threadIdx;

#define __shared__
#define THREADS 8
#define BLOCKS 1
alignas(16) float2 shared[1 << 18];
static std::barrier together(THREADS);
static void __syncthreads() { together.arrive_and_wait(); }

template <class Kernel> void over_blocks(int gx, int gy, Kernel kernel) {
    std::vector<std::thread> threads;
    for (int number = 0; number < THREADS; ++number)
        threads.emplace_back([=] {
            threadIdx.x = number;
            for (int block = 0; block < gx * gy; ++block) {
                blockIdx = {block % gx, block / gx};
                kernel();
                __syncthreads();  // a block may return before it has met
            }
        });
    for (auto &thread : threads) thread.join();
}
