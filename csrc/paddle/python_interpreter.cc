#include "python_interpreter.h"

#include <dlfcn.h>

namespace fastgen::paddle {
namespace {

// The functions of CPython's stable C API that are needed, or null without an interpreter.
struct Api {
  int (*is_initialized)() = nullptr;
  void* (*this_thread_state)() = nullptr;
  int (*gil_check)() = nullptr;
  int (*gil_ensure)() = nullptr;  // the enumeration PyGILState_STATE
  void (*gil_release)(int) = nullptr;
  void* (*save_thread)() = nullptr;
  void (*restore_thread)(void*) = nullptr;
  int (*check_signals)() = nullptr;
  void (*err_fetch)(void**, void**, void**) = nullptr;
  void (*err_restore)(void*, void*, void*) = nullptr;

  template <typename Function>
  static bool Load(const char* name, Function* function) {
    *function = reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
    return *function != nullptr;
  }

  static const Api& Get() {
    static const Api api = [] {
      Api found;
      const bool complete = Load("Py_IsInitialized", &found.is_initialized) &&
                            Load("PyGILState_GetThisThreadState", &found.this_thread_state) &&
                            Load("PyGILState_Check", &found.gil_check) &&
                            Load("PyGILState_Ensure", &found.gil_ensure) &&
                            Load("PyGILState_Release", &found.gil_release) &&
                            Load("PyEval_SaveThread", &found.save_thread) &&
                            Load("PyEval_RestoreThread", &found.restore_thread) &&
                            Load("PyErr_CheckSignals", &found.check_signals) &&
                            Load("PyErr_Fetch", &found.err_fetch) &&
                            Load("PyErr_Restore", &found.err_restore);
      return complete ? found : Api();
    }();
    return api;
  }

  // Whether this thread is one of Python's.
  bool usable() const {
    return is_initialized != nullptr && is_initialized() != 0 && this_thread_state() != nullptr;
  }
};

// Holds the interpreter's lock.
class WithInterpreter {
 public:
  WithInterpreter() : state_(Api::Get().gil_ensure()) {}
  ~WithInterpreter() { Api::Get().gil_release(state_); }
  WithInterpreter(const WithInterpreter&) = delete;
  WithInterpreter& operator=(const WithInterpreter&) = delete;

 private:
  int state_;
};

// References that PyErr_Fetch handed over.
struct Pending {
  void* type = nullptr;
  void* value = nullptr;
  void* traceback = nullptr;
};
thread_local Pending pending;

}  // namespace

WithoutInterpreter::WithoutInterpreter() {
  const Api& api = Api::Get();
  python_thread_ = api.usable();
  if (python_thread_ && api.gil_check() == 1) thread_state_ = api.save_thread();
}

WithoutInterpreter::~WithoutInterpreter() {
  if (thread_state_ != nullptr) Api::Get().restore_thread(thread_state_);
}

void WithoutInterpreter::CheckSignals() {
  if (!python_thread_) return;
  const Api& api = Api::Get();
  const WithInterpreter interpreter;
  if (api.check_signals() == 0) return;
  api.err_fetch(&pending.type, &pending.value, &pending.traceback);
  throw Interrupted();
}

int RaiseInterrupt() {
  if (pending.type == nullptr) return 0;
  Api::Get().err_restore(pending.type, pending.value, pending.traceback);
  pending = Pending();
  return 1;
}

void DropInterrupt() {
  if (pending.type == nullptr) return;
  const Api& api = Api::Get();
  if (!api.usable()) return;
  const WithInterpreter interpreter;
  // Restoring and fetching again would not drop the references, replacing the error does.
  Pending before;
  api.err_fetch(&before.type, &before.value, &before.traceback);
  api.err_restore(pending.type, pending.value, pending.traceback);
  api.err_restore(before.type, before.value, before.traceback);
  pending = Pending();
}

}  // namespace fastgen::paddle
