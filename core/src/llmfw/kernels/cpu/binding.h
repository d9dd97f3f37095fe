// C++ functions as Python callables, through the few symbols of CPython's stable ABI that this takes.
//
// A call costs a tenth of a microsecond where ctypes takes one, and a decode step makes hundreds. No Python.h is
// needed (it is often not installed) and one object serves every version of CPython: launch.py turns the table
// `llmfw_methods` into callables. Arguments are integers (addresses among them) and floats.
#pragma once

#include <cstddef>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>

extern "C" {
struct PyObject;
struct PyThreadState;
long long PyLong_AsLongLong(PyObject*);
double PyFloat_AsDouble(PyObject*);
PyObject* PyErr_Occurred();
PyObject* PyErr_Format(PyObject*, const char*, ...);
PyObject* PyBool_FromLong(long);
PyThreadState* PyEval_SaveThread();
void PyEval_RestoreThread(PyThreadState*);
extern PyObject* PyExc_TypeError;

using Fastcall = PyObject* (*)(PyObject*, PyObject* const*, std::ptrdiff_t);
struct MethodDef {
  const char* name;
  Fastcall call;
  int flags;  // 0x80: METH_FASTCALL
  const char* doc;
};
}

namespace llmfw {

// Lets other Python threads run, for work long enough to be worth the exchange: a thread that gives the lock away
// may wait 5 ms to have it back.
class Unlocked {
 public:
  explicit Unlocked(int64_t multiply_adds) : state_(multiply_adds > kLong ? PyEval_SaveThread() : nullptr) {}
  ~Unlocked() {
    if (state_) PyEval_RestoreThread(state_);
  }
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;

 private:
  static constexpr int64_t kLong = 8 << 20;
  PyThreadState* state_;
};

template <class A>
A from_python(PyObject* value) {
  if constexpr (std::is_floating_point_v<A>) {
    return static_cast<A>(PyFloat_AsDouble(value));
  } else if constexpr (std::is_pointer_v<A>) {
    return reinterpret_cast<A>(PyLong_AsLongLong(value));
  } else {
    return static_cast<A>(PyLong_AsLongLong(value));
  }
}

template <auto kFunction, class... A, size_t... I>
PyObject* invoke(PyObject* const* args, void (*)(A...), std::index_sequence<I...>) {
  const auto values = std::make_tuple(from_python<A>(args[I])...);
  if (PyErr_Occurred()) return nullptr;
  kFunction(std::get<I>(values)...);
  return PyBool_FromLong(1);
}

template <class... A>
constexpr std::ptrdiff_t arity(void (*)(A...)) {
  return sizeof...(A);
}
template <class... A>
constexpr std::index_sequence_for<A...> indices(void (*)(A...)) {
  return {};
}

template <auto kFunction>
PyObject* call(PyObject*, PyObject* const* args, std::ptrdiff_t count) {
  if (count != arity(kFunction)) {
    return PyErr_Format(PyExc_TypeError, "kernel takes %zd arguments, not %zd", arity(kFunction), count);
  }
  return invoke<kFunction>(args, kFunction, indices(kFunction));
}

}  // namespace llmfw
