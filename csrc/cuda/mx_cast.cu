// MX casts on NVIDIA GPUs: what formats.quantize computes with blocks of 32 along rows, along columns, or both at once.
//
// Bytes moved per element with a bfloat16 x and 8-bit codes: 2 read, 1 written and 1/32 for scales, per direction; the
// second direction costs no second read. C ABI, no torch headers: one build serves every torch version.
#include <cuda_runtime.h>

#include "mx_tile.cuh"

namespace aotrain::mx {
namespace {

struct DeviceGroup {
    template <class T>
    struct Local {
        T value;
        AOTRAIN_DEVICE T& operator[](int) { return value; }
    };

    uint8_t* shared;
    uint32_t tile;

    template <class F>
    AOTRAIN_DEVICE void threads(const F& f) {
        f(static_cast<int>(threadIdx.x));
    }
    AOTRAIN_DEVICE void barrier() {
        asm volatile("cp.async.wait_all;" ::: "memory");
        __syncthreads();
    }
    AOTRAIN_DEVICE void keep_larger_of_pairs(Local<uint32_t>& local) {
        local.value = larger(local.value, __shfl_xor_sync(0xFFFFFFFF, local.value, 1));
    }
    AOTRAIN_DEVICE void copy(Access, uint8_t* to, const uint8_t* from, int bytes) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                         static_cast<uint32_t>(__cvta_generic_to_shared(to))),
                     "l"(from), "r"(bytes)
                     : "memory");
    }
    template <class T>
    AOTRAIN_DEVICE T load(Access, const uint8_t* from) {
        return *reinterpret_cast<const T*>(from);
    }
    template <class T>
    AOTRAIN_DEVICE void store(Access, uint8_t* to, const T& value) {
        *reinterpret_cast<T*>(to) = value;
    }
};

// Two groups on a processor hide the latency of float32's 64 registers of x; 16-bit inputs leave room for four.
template <class In>
constexpr int kGroupsPerProcessor = In::kPerWord == 2 ? 4 : 2;

template <class In, class E, int kWays>
__global__ void __launch_bounds__(kThreads, kGroupsPerProcessor<In>) mx_cast_kernel(const __grid_constant__ Cast c) {
    extern __shared__ __align__(16) uint8_t shared[];
    DeviceGroup group{shared, blockIdx.x};
    cast_tile<In, E, kWays>(c, group);
}

template <class In, class E, int kWays>
cudaError_t launch(const Cast& c, cudaStream_t stream) {
    constexpr auto kernel = mx_cast_kernel<In, E, kWays>;
    if constexpr (kSharedBytes<In> > 48 << 10) {  // what a kernel gets without asking
        const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes<In>);
        if (error != cudaSuccess) return error;
    }
    kernel<<<c.tiles, kThreads, kSharedBytes<In>, stream>>>(c);
    return cudaGetLastError();
}

template <class In, class E>
cudaError_t launch_ways(const Cast& c, cudaStream_t stream) {
    if (c.by_column.codes == nullptr) return launch<In, E, kRows>(c, stream);
    return c.by_row.codes == nullptr ? launch<In, E, kColumns>(c, stream) : launch<In, E, kBothWays>(c, stream);
}

template <class In>
cudaError_t launch_element(const Cast& c, int64_t element, cudaStream_t stream) {
    if (element == kE4m3) return launch_ways<In, E4m3>(c, stream);
    return element == kE5m2 ? launch_ways<In, E5m2>(c, stream) : launch_ways<In, E2m1>(c, stream);
}

}  // namespace
}  // namespace aotrain::mx

extern "C" {

// `arguments` is a mx::Arguments. The cudaError_t of the launch.
__attribute__((visibility("default"))) int aotrain_mx_cast(const void* arguments, void* stream) {
    using namespace aotrain::mx;
    const auto& a = *static_cast<const Arguments*>(arguments);
    Cast c;
    if (!plan(a, c)) return cudaErrorInvalidValue;
    // This library has a CUDA runtime of its own, whose current device is not that of the caller's.
    const auto error = cudaSetDevice(static_cast<int>(a.device));
    if (error != cudaSuccess) return error;
    const auto queue = static_cast<cudaStream_t>(stream);
    if (a.input == kFloat32Input) return launch_element<Float32>(c, a.element, queue);
    return a.input == kBfloat16Input ? launch_element<Bfloat16>(c, a.element, queue)
                                     : launch_element<Float16>(c, a.element, queue);
}

__attribute__((visibility("default"))) const char* aotrain_mx_cast_error(int error) {
    return cudaGetErrorString(static_cast<cudaError_t>(error));
}
}
