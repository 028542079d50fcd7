// The Python module safnet_ops._C_cuda: importing it registers the CUDA kernels (see SAFNET_REGISTER in tensors.h).
#define Py_LIMITED_API 0x030a0000
#include <Python.h>

#if defined(_WIN32)
#define SAFNET_EXPORT __declspec(dllexport)
#else
#define SAFNET_EXPORT __attribute__((visibility("default")))
#endif

extern "C" SAFNET_EXPORT PyObject* PyInit__C_cuda() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT,
                               "_C_cuda",
                               "CUDA kernels of safnet_ops, for " SAFNET_ARCHITECTURES ".",
                               -1,
                               nullptr,
                               nullptr,
                               nullptr,
                               nullptr,
                               nullptr};
  return PyModule_Create(&module);
}
