//! The witness: the program that is init in the test guest.

fn main() {}
