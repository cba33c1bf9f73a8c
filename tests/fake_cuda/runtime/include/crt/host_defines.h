// The compiler's own header of the CUDA toolkit, which the wheels of the runtime do not contain. The runtime's headers
// use these words to mark functions and types for nvcc; for g++ they mean nothing.
#pragma once

#define __host__
#define __device__
#define __cudart_builtin__
#define __device_builtin__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __builtin_align__(n) __attribute__((aligned(n)))
#define __align__(n) __attribute__((aligned(n)))
#define __specialization_static static
#define CUDARTAPI
#define CUDARTAPI_CDECL
