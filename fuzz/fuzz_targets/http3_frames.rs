#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| viaduct::fuzzing::http3_frames(bytes));
