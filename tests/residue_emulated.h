// What lets residue.cu run on a CPU, one thread a block (tests/test_residue.py).
#include <algorithm>
#include <cmath>
#define __device__
#define __restrict__

using std::min;
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(n, m)
struct float2 { float x, y; };
static float2 make_float2(float x, float y) { return {x, y}; }
struct Index { int x, y; };
static Index blockIdx, threadIdx = {0, 0};
static void __syncthreads() {}


#define __shared__
#define THREADS 1
#define BLOCKS 1
float2 shared[1 << 20];
