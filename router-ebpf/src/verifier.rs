//! What the verifier must be told, or must not be told. Each is one or two instructions.

/// The same number, but one the verifier knows nothing of.
///
/// It follows every value that a variable can have, so an index out of a loop of eight multiplies
/// all that comes after by eight. Adding and subtracting something unknown lets it merge them.
#[inline(always)]
#[cfg(target_arch = "bpf")]
pub fn forget(number: u32, unknown: u64) -> u32 {
    let mut number = u64::from(number);
    // SAFETY: two additions in registers.
    unsafe {
        core::arch::asm!(
            "{number} += {unknown}",
            "{number} -= {unknown}",
            number = inout(reg) number,
            unknown = in(reg) unknown,
            options(pure, nomem, nostack),
        );
    }
    number as u32
}

#[cfg(not(target_arch = "bpf"))]
pub fn forget(number: u32, _unknown: u64) -> u32 {
    number
}

/// `number & MASK`, where the compiler cannot take the mask away because it knows better.
#[inline(always)]
#[cfg(target_arch = "bpf")]
pub fn bounded<const MASK: i32>(number: u32) -> usize {
    let mut number = u64::from(number);
    // SAFETY: one operation in a register.
    unsafe {
        core::arch::asm!(
            "{number} &= {mask}",
            number = inout(reg) number,
            mask = const MASK,
            options(pure, nomem, nostack),
        );
    }
    number as usize
}

#[cfg(not(target_arch = "bpf"))]
pub fn bounded<const MASK: i32>(number: u32) -> usize {
    (number & MASK as u32) as usize
}

/// A packet pointer out of a program's context, at `OFFSET` of it.
///
/// The field has 32 bits, and the verifier puts a pointer of 64 in its place. The compiler must not
/// know of the 32, or it spills only those.
#[inline(always)]
#[cfg(target_arch = "bpf")]
pub fn packet_pointer<const OFFSET: usize, T>(context: *const T) -> usize {
    let pointer: u64;
    // SAFETY: reads a field of the context, which is valid for the whole run.
    unsafe {
        core::arch::asm!(
            "{pointer} = *(u32 *)({context} + {offset})",
            pointer = out(reg) pointer,
            context = in(reg) context,
            offset = const OFFSET,
            options(nostack),
        );
    }
    pointer as usize
}

#[cfg(not(target_arch = "bpf"))]
pub fn packet_pointer<const OFFSET: usize, T>(_context: *const T) -> usize {
    0
}

/// Compare-and-swap; false if someone else was faster.
///
/// By hand, since Rust's BPF target declares no atomic read-modify-write. The instruction is
/// `BPF_ATOMIC | BPF_CMPXCHG` (RFC 9669 §5.3), Linux 5.12 and later.
#[inline(always)]
#[cfg(target_arch = "bpf")]
pub fn swap(word: &u64, old: u64, new: u64) -> bool {
    let found: u64;
    // SAFETY: the word is a map's, aligned to 8 and writable whatever the reference says.
    unsafe {
        core::arch::asm!(
            "r0 = cmpxchg_64({word} + 0, r0, {new})",
            word = in(reg) core::ptr::from_ref(word).cast_mut(),
            new = in(reg) new,
            inout("r0") old => found,
        );
    }
    found == old
}

#[cfg(not(target_arch = "bpf"))]
pub fn swap(_word: &u64, _old: u64, _new: u64) -> bool {
    false
}

/// Atomic addition (`BPF_ATOMIC | BPF_ADD`).
#[inline(always)]
#[cfg(target_arch = "bpf")]
pub fn add(word: &u64, number: u64) {
    // SAFETY: as in `swap`.
    unsafe {
        core::arch::asm!(
            "lock *(u64 *)({word} + 0) += {number}",
            word = in(reg) core::ptr::from_ref(word).cast_mut(),
            number = in(reg) number,
        );
    }
}

#[cfg(not(target_arch = "bpf"))]
pub fn add(_word: &u64, _number: u64) {}

/// Atomic addition of 1 (`BPF_ATOMIC | BPF_ADD | BPF_FETCH`); the number before.
#[inline(always)]
#[cfg(target_arch = "bpf")]
pub fn next(word: &u64) -> u64 {
    let mut number = 1_u64;
    // SAFETY: as in `swap`.
    unsafe {
        core::arch::asm!(
            "{number} = atomic_fetch_add((u64 *)({word} + 0), {number})",
            word = in(reg) core::ptr::from_ref(word).cast_mut(),
            number = inout(reg) number,
        );
    }
    number
}

#[cfg(not(target_arch = "bpf"))]
pub fn next(_word: &u64) -> u64 {
    0
}

#[inline(always)]
pub fn load(word: &u64) -> u64 {
    // SAFETY: a reference is readable; volatile, because other cores write behind it.
    unsafe { core::ptr::read_volatile(word) }
}
