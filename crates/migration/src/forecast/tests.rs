//! Cases by hand and properties.
