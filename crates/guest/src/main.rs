//! The executable of the witness: init of the test guest. All it does is in the library.

fn main() {
    whimbrel_guest::run();
}
