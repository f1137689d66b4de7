// One thread of a block: a stack of its own, entered and left by hand.
//
// The first entry is makecontext's; later switches are _setjmp and _longjmp, which save no signal mask: no system call, about
// 10 ns. A fiber that met an error is never entered again: what lay on its stack is dropped without destructors. A kernel keeps
// nothing there that owns memory; of the layer's own, the words of that one report may be lost.
#pragma once

#include <csetjmp>
#include <stdexcept>
#include <sys/mman.h>
#include <ucontext.h>

#if defined(_FORTIFY_SOURCE) && _FORTIFY_SOURCE > 0
#error "fibers need -U_FORTIFY_SOURCE: its longjmp refuses to change stacks"
#endif

#include "report.h"

namespace device::host {

struct Fiber {
  static constexpr size_t kStack = 128 << 10, kGuard = 4096;

  Fiber() {
    stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack == MAP_FAILED) throw std::runtime_error("no memory for the stack of a thread");
    // A kernel that needs more than its stack stops the process there instead of writing into another thread's.
    if (mprotect(stack, kGuard, PROT_NONE)) {
      munmap(stack, kStack);
      throw std::runtime_error("no memory for the stack of a thread: each is two mappings of the process, of which the system "
                               "allows a number (vm.max_map_count)");
    }
  }
  ~Fiber() { munmap(stack, kStack); }
  Fiber(const Fiber&) = delete;

  void* stack;
  bool entered = false;
  std::jmp_buf self;
};

inline std::jmp_buf scheduler;

// From the scheduler into a fiber, until it calls leave(). `main` is what a fiber that was never entered runs; it must not return.
__attribute__((noinline)) inline void enter(Fiber& fiber, void (*main)()) {
  if (_setjmp(scheduler)) return;
  if (fiber.entered) _longjmp(fiber.self, 1);
  fiber.entered = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack;
  context.uc_stack.ss_size = Fiber::kStack;
  context.uc_link = nullptr;
  makecontext(&context, main, 0);
  setcontext(&context);
}

// From a fiber to the scheduler; returns when the fiber is entered again.
__attribute__((noinline)) inline void leave(Fiber& fiber) {
  if (!_setjmp(fiber.self)) _longjmp(scheduler, 1);
}

}  // namespace device::host
