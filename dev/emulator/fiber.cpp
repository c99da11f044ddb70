// fiber.cpp - emu_switch(save_stack_pointer, stack_pointer), the switch between two stacks on x86-64. In the
// System V calling convention a called function must preserve rbp, rbx and r12 to r15, so these are pushed on
// the old stack and popped from the new one. `ret` then continues at the return address on the new stack.
#include "fiber.h"
#if !defined(EMU_UCONTEXT)
__asm__(R"(
.text
.globl emu_switch
.type emu_switch, @function
emu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emu_switch, .-emu_switch
)");
#endif
