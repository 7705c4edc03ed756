//! Work that several threads take from one list.

/// Has as many threads as `most`, this one among them, do `work` until it is done. Without further threads it takes longer,
/// that is all.
///
/// # Errors
/// That of a thread that failed; all have ended.
pub fn together<E: Send>(most: usize, work: impl Fn() -> Result<(), E> + Sync) -> Result<(), E> {
    let work = &work;
    std::thread::scope(|scope| {
        let begin = |_| std::thread::Builder::new().spawn_scoped(scope, work).ok();
        let others: Vec<_> = (1..most).filter_map(begin).collect();
        let own = work();
        others.into_iter().fold(own, |result, other| {
            result.and(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        })
    })
}
