// The device of device.h on a GPU, and the only file that sees ggml-cuda's internals: a backend's stream, and its
// converters of the ggml types.

#include "device.h"

#include "../device-cuda.h"
#include "../internal.h"

#include "common.cuh"
#include "convert.cuh"
#include "ggml-backend-impl.h"

#include <cublas_v2.h>

#include <cstdio>
#include <string>

#include "memory.inc"

namespace bupo::cuda {

static void check_cuda(cudaError_t error, const char * what) {
    if (error != cudaSuccess) {
        throw Failure(std::string(what) + ": " + cudaGetErrorString(error));
    }
}

static void check_cublas(cublasStatus_t status, const char * what) {
    if (status != CUBLAS_STATUS_SUCCESS) {
        throw Failure(std::string(what) + ": " + cublasGetStatusString(status));
    }
}

void Device::check(cudaError_t error, const char * what) {
    check_cuda(error, what);
}

void * Device::Memory::allocate(size_t bytes) {
    void *            data  = nullptr;
    const cudaError_t error = cudaMalloc(&data, bytes);
    if (error == cudaErrorMemoryAllocation) {
        cudaGetLastError(); // or the next launch would report it
        throw Failure(std::to_string(bytes >> 20) + " MiB of GPU memory are not to be had; lower --micro-batch-tokens or --kv-mib");
    }
    check_cuda(error, "cudaMalloc");
    return data;
}

void Device::Memory::release(void * data) {
    cudaFree(data);
}

// A handle of our own: ggml-cuda's rounds the factors of F32 products to TF32.
struct Device::Blas {
    cublasHandle_t handle = nullptr;

    explicit Blas(cudaStream_t stream) {
        check_cublas(cublasCreate(&handle), "cublasCreate");
        check_cublas(cublasSetStream(handle, stream), "cublasSetStream");
        check_cublas(cublasSetMathMode(handle, CUBLAS_DEFAULT_MATH), "cublasSetMathMode");
    }

    ~Blas() {
        if (handle) {
            cublasDestroy(handle);
        }
    }
};

Device::Device(int index, void * stream, bool precise)
    : memory_(std::make_unique<Memory>()), precise_(precise), index_(index), stream_(static_cast<cudaStream_t>(stream)) {
    enter();
    blas_ = std::make_unique<Blas>(stream_);
}

Device::~Device() {
    cudaSetDevice(index_);
}

void Device::enter() {
    check_cuda(cudaSetDevice(index_), "cudaSetDevice");
}

void Device::zero(void * to, size_t bytes) {
    check_cuda(cudaMemsetAsync(to, 0, bytes, stream_), "cudaMemsetAsync");
}

void Device::copy(void * to, const void * from, size_t bytes) {
    check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream_), "cudaMemcpyAsync");
}

bool Device::far(const ggml_tensor * tensor) {
    return tensor->buffer && ggml_backend_buffer_is_host(tensor->buffer);
}

void Device::download(void * to, const void * from, size_t bytes) {
    check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream_), "cudaMemcpyAsync to the host");
    check_cuda(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
}

void Device::upload(void * to, const void * from, size_t bytes) {
    check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_), "cudaMemcpyAsync to the device");
    // `from` may be changed from now on.
    check_cuda(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
}

// alpha and beta of a product whose factors were scaled.
static __global__ void scalars(float alpha, float beta, const float * shrink_a, const float * shrink_b, float * out) {
    if (threadIdx.x == 0) {
        out[0] = alpha * (shrink_a ? *shrink_a : 1.0f) * (shrink_b ? *shrink_b : 1.0f);
        out[1] = beta;
    }
}

void Device::multiply(const Product & p, const Factor & a, const Factor & b, float * c, int64_t c_ld) {
    if (a.kind != b.kind) {
        throw Failure("a product of factors of two types");
    }
    const cudaDataType      type = a.kind == Kind::F32 ? CUDA_R_32F : CUDA_R_16F;
    const cublasOperation_t op_a = a.turned ? CUBLAS_OP_T : CUBLAS_OP_N;
    const cublasOperation_t op_b = b.turned ? CUBLAS_OP_T : CUBLAS_OP_N;
    const float * alpha = &p.alpha;
    const float * beta  = &p.beta;
    const bool    scaled = a.shrink || b.shrink;
    if (scaled) {
        float * both = floats(2);
        launch(scalars, 1, 32, p.alpha, p.beta, a.shrink, b.shrink, both);
        alpha = both;
        beta  = both + 1;
    }
    check_cublas(cublasSetPointerMode(blas_->handle, scaled ? CUBLAS_POINTER_MODE_DEVICE : CUBLAS_POINTER_MODE_HOST),
                 "cublasSetPointerMode");
    const cublasStatus_t status = cublasGemmStridedBatchedEx(
        blas_->handle, op_a, op_b, (int) p.m, (int) p.n, (int) p.k, alpha, a.data, type, (int) a.ld, a.stride, b.data, type,
        (int) b.ld, b.stride, beta, c, CUDA_R_32F, (int) c_ld, p.stride, (int) p.batch, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
    if (status != CUBLAS_STATUS_SUCCESS) {
        char shape[128];
        std::snprintf(shape, sizeof(shape), "cuBLAS product of %lld x %lld x %lld, %lld times", (long long) p.m, (long long) p.n,
                      (long long) p.k, (long long) p.batch);
        check_cublas(status, shape);
    }
}

const void * Device::rows(const ggml_tensor * matrix, int64_t first, int64_t n, Kind kind) {
    const void * from  = static_cast<const char *>(matrix->data) + first * (int64_t) matrix->nb[1];
    const size_t bytes = (size_t) n * matrix->nb[1];
    if (far(matrix)) {
        // A layer that stays in host memory (--gpu-layers): its blocks come over the bus for each use.
        void * staged = scratch(bytes);
        check_cuda(cudaMemcpyAsync(staged, from, bytes, cudaMemcpyHostToDevice, stream_), "cudaMemcpyAsync of weights");
        from = staged;
    }
    if (matrix->type == (kind == Kind::F32 ? GGML_TYPE_F32 : GGML_TYPE_F16)) {
        return from;
    }
    const int64_t count = n * matrix->ne[0];
    void *        out   = scratch((size_t) count * size_of(kind));
    if (kind == Kind::F32) {
        if (const to_fp32_cuda_t convert = ggml_get_to_fp32_cuda(matrix->type)) {
            convert(from, static_cast<float *>(out), count, stream_);
            return out;
        }
    } else if (const to_fp16_cuda_t convert = ggml_get_to_fp16_cuda(matrix->type)) {
        convert(from, static_cast<half *>(out), count, stream_);
        return out;
    }
    throw Failure(std::string("ggml-cuda has no converter for ") + ggml_type_name(matrix->type) + "; use --device cpu");
}

void * stream_of(ggml_backend_t backend) {
    return static_cast<ggml_backend_cuda_context *>(backend->context)->stream();
}

} // namespace bupo::cuda

using bupo::cuda::check_cuda;

bool bupo_cuda_decodes(ggml_type type) {
    return type == GGML_TYPE_F32 || (ggml_get_to_fp32_cuda(type) && (type == GGML_TYPE_F16 || ggml_get_to_fp16_cuda(type)));
}

bupo_status bupo_cuda_count(int * n) {
    if (!n) {
        return bupo::fail(BUPO_ERR_ARGUMENT, "null argument");
    }
    return bupo::guarded(
        [&] {
            int count = 0;
            check_cuda(cudaGetDeviceCount(&count), "looking for GPUs");
            *n = count;
            return BUPO_OK;
        },
        BUPO_ERR_DEVICE);
}

bupo_status bupo_cuda_info(int index, bupo_gpu * out) {
    int n = 0;
    if (const bupo_status status = bupo_cuda_count(&n); status != BUPO_OK) {
        return status;
    }
    if (!out || index < 0 || index >= n) {
        return bupo::fail(BUPO_ERR_ARGUMENT, "null argument or index out of range");
    }
    return bupo::guarded(
        [&] {
            cudaDeviceProp properties;
            check_cuda(cudaGetDeviceProperties(&properties, index), "cudaGetDeviceProperties");
            size_t free = 0, total = 0;
            check_cuda(cudaSetDevice(index), "cudaSetDevice");
            check_cuda(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
            *out = {};
            std::snprintf(out->name, sizeof(out->name), "%s", properties.name);
            out->compute_capability = (uint32_t) (10 * properties.major + properties.minor);
            out->bytes_free         = free;
            out->bytes_total        = total;
            return BUPO_OK;
        },
        BUPO_ERR_DEVICE);
}
