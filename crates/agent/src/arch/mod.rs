//! Machine code of the agent, one module an architecture.

#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
pub use x86_64::*;

#[cfg(not(target_arch = "x86_64"))]
compile_error!("the agent exists for x86_64 only; arch/ is where another architecture is added");
