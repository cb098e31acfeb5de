// What lies somewhere, or zeros: loads without branches, so that many are under way together.
#ifdef ON_CPU
template <class T> inline T read_if(bool so, const T *from) { return so ? *from : T{}; }
inline float root_of(float a) { return std::sqrt(a); }
inline float one_over(float a) { return 1 / a; }
#else
__device__ __forceinline__ float read_if(bool so, const float *from) {
    float a;
    asm("{ .reg .pred p; setp.ne.s32 p, %1, 0; mov.f32 %0, 0f00000000; @p ld.global.f32 %0, [%2]; }" : "=f"(a) : "r"((int)so), "l"(from));
    return a;
}
__device__ __forceinline__ float2 read_if(bool so, const float2 *from) {
    float2 a;
    asm("{ .reg .pred p; setp.ne.s32 p, %2, 0; mov.f32 %0, 0f00000000; mov.f32 %1, 0f00000000; @p ld.global.v2.f32 {%0, %1}, [%3]; }"
        : "=f"(a.x), "=f"(a.y) : "r"((int)so), "l"(from));
    return a;
}
__device__ __forceinline__ float4 read_if(bool so, const float4 *from) {
    float4 a;
    asm("{ .reg .pred p; setp.ne.s32 p, %4, 0; mov.f32 %0, 0f00000000; mov.f32 %1, 0f00000000; mov.f32 %2, 0f00000000;"
        " mov.f32 %3, 0f00000000; @p ld.global.v4.f32 {%0, %1, %2, %3}, [%5]; }"
        : "=f"(a.x), "=f"(a.y), "=f"(a.z), "=f"(a.w) : "r"((int)so), "l"(from));
    return a;
}
__device__ __forceinline__ int read_if(bool so, const int *from) {
    int a;
    asm("{ .reg .pred p; setp.ne.s32 p, %1, 0; mov.s32 %0, 0; @p ld.global.s32 %0, [%2]; }" : "=r"(a) : "r"((int)so), "l"(from));
    return a;
}
__device__ __forceinline__ long long read_if(bool so, const long long *from) {
    long long a;
    asm("{ .reg .pred p; setp.ne.s32 p, %1, 0; mov.s64 %0, 0; @p ld.global.s64 %0, [%2]; }" : "=l"(a) : "r"((int)so), "l"(from));
    return a;
}
__device__ __forceinline__ float one_over(float a) {
    float b;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(b) : "f"(a));
    return b;
}
__device__ __forceinline__ float root_of(float a) {  // exact of squares; not of 0
    float b;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(b) : "f"(a));
    const float root = a * b;
    return fmaf(0.5f * b, fmaf(-root, root, a), root);
}
#endif
