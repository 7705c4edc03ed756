//! Options of internet sockets of every protocol that the image has fields for: ip(7), ipv6(7).

use super::option_table::{Field, Kinds, OPTIONS, Place, SocketOption, When};
use super::options::Making;
use super::reading::Reading;
use crate::Problem;
use rewake_image::messages::{InetSkEntry, IpOptsEntry};
use rewake_sys::sockets::option_int;

/// Reads them.
pub(super) fn survey(reading: Reading<'_>, kinds: Kinds) -> Result<IpOptsEntry, Problem> {
    let mut entry = IpOptsEntry::default();
    for (row, field) in in_ip(kinds) {
        let value = reading
            .int(row.level, row.number)
            .map_err(|e| reading.socket.problem(format!("{} cannot be read: {e}", row.name)))?;
        if value != 0 || field.always {
            (field.put)(&mut entry, value);
        }
    }
    Ok(entry)
}

fn in_ip(
    kinds: Kinds,
) -> impl Iterator<Item = (&'static SocketOption, &'static Field<IpOptsEntry>)> {
    OPTIONS.iter().filter(move |row| row.kinds.any(kinds)).filter_map(|row| match &row.place {
        Place::Ip(field) => Some((row, field)),
        _ => None,
    })
}

/// The kind of a socket of the image.
pub(super) fn kinds(entry: &InetSkEntry) -> Kinds {
    Kinds::of(entry.family as i32, entry.r#type as i32, entry.proto as i32)
}

/// Sets what of ip(7) and ipv6(7) decides where a socket may be bound.
pub(super) fn apply_before_bind(making: Making<'_>, entry: &InetSkEntry) -> Result<(), Problem> {
    let v6 = entry.family as i32 == libc::AF_INET6;
    let (level, name) = (libc::IPPROTO_IPV6, libc::IPV6_V6ONLY);
    // Of raw sockets it cannot be changed; of others the default is a sysctl.
    if let Some(v6only) = entry.v6only.filter(|_| v6).map(i32::from)
        && option_int(making.fd, level, name) != Ok(v6only)
    {
        making.set(level, name, "IPV6_V6ONLY", v6only)?;
    }
    apply_phase(making, entry, When::BeforeBind)
}

/// Sets the other options of ip(7) and ipv6(7).
pub(super) fn apply(making: Making<'_>, entry: &InetSkEntry) -> Result<(), Problem> {
    apply_phase(making, entry, When::Made)
}

fn apply_phase(making: Making<'_>, entry: &InetSkEntry, when: When) -> Result<(), Problem> {
    let Some(options) = &entry.ip_opts else { return Ok(()) };
    for (row, field) in in_ip(kinds(entry)).filter(|(row, _)| row.when == when) {
        if let Some(value) = (field.get)(options) {
            making.set_field(row, field.default, value)?;
        }
    }
    Ok(())
}
