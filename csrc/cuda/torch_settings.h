// Settings of torch that its stable ABI does not give: asked of Python.
#pragma once

#define Py_LIMITED_API 0x030a0000
#include <Python.h>

namespace safnet::cuda {

// Whether float32 convolutions may round their factors to TF32: torch.backends.cudnn.allow_tf32, or its successor
// torch.backends.cudnn.conv.fp32_precision. Without an interpreter: no.
inline bool torch_allows_tf32() {
  if (Py_IsInitialized() == 0) return false;
  const PyGILState_STATE state = PyGILState_Ensure();  // torch calls operators without the lock
  PyObject* cudnn = PyImport_ImportModule("torch.backends.cudnn");
  PyObject* convolutions = cudnn != nullptr ? PyObject_GetAttrString(cudnn, "conv") : nullptr;
  PyObject* precision = convolutions != nullptr ? PyObject_GetAttrString(convolutions, "fp32_precision") : nullptr;
  const bool allowed =
      precision != nullptr && PyUnicode_Check(precision) && PyUnicode_CompareWithASCIIString(precision, "tf32") == 0;
  Py_XDECREF(precision);
  Py_XDECREF(convolutions);
  Py_XDECREF(cudnn);
  PyErr_Clear();
  PyGILState_Release(state);
  return allowed;
}

}  // namespace safnet::cuda
