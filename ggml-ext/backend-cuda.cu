// backend.cpp around ggml's CUDA backend: device.h launches kernels, so it is nvcc that must read it.
#include "backend.cpp"
