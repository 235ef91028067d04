// The interpreter of the process, if there is one: its lock is given up while the engine works, and
// its signal handlers get to run, so that ctrl-C ends a long call.
//
// Found at run time: the op needs no Python header and works in processes without Python.
#pragma once

#include <stdexcept>

namespace fastgen::paddle {

// A signal handler raised an exception (KeyboardInterrupt as a rule). It is kept for
// RaiseInterrupt(), because Paddle turns every C++ exception into one of its own.
class Interrupted : public std::runtime_error {
 public:
  Interrupted() : std::runtime_error("interrupted by a signal") {}
};

// Gives up the interpreter's lock for its lifetime, if this thread holds it; Paddle has done so
// already when it runs an op for Python.
class WithoutInterpreter {
 public:
  WithoutInterpreter();
  ~WithoutInterpreter();
  WithoutInterpreter(const WithoutInterpreter&) = delete;
  WithoutInterpreter& operator=(const WithoutInterpreter&) = delete;

  // Runs pending signal handlers (which Python does on its main thread only). Throws Interrupted.
  void CheckSignals();

 private:
  bool python_thread_ = false;    // a thread of Paddle's own must not ask for the lock: the thread
                                  // that waits for it may hold it
  void* thread_state_ = nullptr;  // null: the lock was not ours
};

// Raises the exception that ended this thread's last call, to be called with the interpreter's
// lock held; returns 1 if there was one.
int RaiseInterrupt();

// Forgets it.
void DropInterrupt();

}  // namespace fastgen::paddle
