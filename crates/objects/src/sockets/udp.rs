//! UDP and UDP-Lite: udp(7), udplite(7).

use crate::Problem;
use crate::files::collect::{Collector, View};
use rewake_image::messages::InetSkEntry;
use rewake_sys::sockets::option_int;

/// What is particular to UDP and UDP-Lite.
pub(super) fn survey(
    collector: &mut Collector,
    view: &View<'_>,
    entry: &mut InetSkEntry,
) -> Result<(), Problem> {
    let fd = view.as_fd();
    if option_int(fd, libc::IPPROTO_UDP, libc::UDP_CORK).is_ok_and(|corked| corked != 0) {
        return Err(view
            .problem("a datagram is being put together in it (UDP_CORK or MSG_MORE)")
            .remedy("try again once the program has sent it"));
    }
    if rustix::io::ioctl_fionread(fd).is_ok_and(|waiting| waiting != 0) {
        log::warn!("{}: the datagrams it has received, and not read, are not saved", view.object());
    }
    let shutdown = collector
        .sockets
        .inet(entry.family, entry.proto, entry.ino)
        .map_err(|e| view.problem(format!("sock_diag does not tell its state: {e}")))?
        .map_or(0, |record| i32::from(record.shutdown));
    entry.shutdown = (shutdown != 0).then_some(shutdown);
    Ok(())
}
