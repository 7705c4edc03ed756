//! UDP and UDP-Lite: udp(7), udplite(7).

use super::datagram;
use crate::Problem;
use crate::files::collect::{Collector, View};
use rewake_image::messages::{InetSkEntry, RewakeDatagramEntry};
use rewake_sys::sockets::{option_int, queue_length};
use rustix::fd::BorrowedFd;
use std::time::Duration;

const SIOCOUTQ: u32 = 0x5411;
/// How long what was sent may take to leave.
const PATIENCE: u32 = 20;

/// Surveys what is particular to UDP and UDP-Lite: what it has received.
pub(super) fn survey(
    collector: &mut Collector,
    view: &View<'_>,
    entry: &mut InetSkEntry,
) -> Result<Vec<RewakeDatagramEntry>, Problem> {
    if is_pending(view.as_fd()) {
        return Err(view
            .problem("a datagram is being put together in it (UDP_CORK or MSG_MORE), or one that it sent cannot leave")
            .remedy("try again once the program has sent it"));
    }
    let shutdown = collector
        .sockets
        .inet(entry.family, entry.proto, entry.ino)
        .map_err(|e| view.problem(format!("sock_diag does not tell its state: {e}")))?
        .map_or(0, |record| i32::from(record.shutdown));
    entry.shutdown = (shutdown != 0).then_some(shutdown);
    datagram::read(view)
}

/// Whether there is a part of a datagram that is not sent yet. The kernel tells its bytes among those that were sent and
/// have not left; but those go away by themselves.
fn is_pending(fd: BorrowedFd<'_>) -> bool {
    let held = || queue_length(fd, SIOCOUTQ).unwrap_or(0);
    let before = held();
    if before == 0 {
        return false;
    }
    if option_int(fd, libc::IPPROTO_UDP, libc::UDP_CORK).is_ok_and(|corked| corked != 0) {
        return true;
    }
    (0..PATIENCE).all(|_| {
        std::thread::sleep(Duration::from_millis(1));
        held() == before
    })
}
