//! `--replace-address`: other addresses for the sockets of the images, in memory.

use crate::error::{Error, Result};
use crate::options::RestoreOptions;
use rewake_image::addresses::{Change, Rule, Template};
use rewake_objects::files::open::Opener;
use rewake_objects::sockets::host;
use std::net::IpAddr;

const TCP: u32 = libc::IPPROTO_TCP as u32;

/// The rules of copy `i`.
///
/// # Errors
/// One makes no sense for this copy.
pub fn rules(templates: &[Template], i: u32) -> Result<Vec<Rule>> {
    let rule = |t: &Template| t.rule(i).map_err(|e| Error::new(format!("--replace-address {e}")));
    templates.iter().map(rule).collect()
}

/// Applies `rules` to what the opener is going to open. Returns what the user should know.
///
/// # Errors
/// A socket would be bound to an address that this host does not have.
pub fn replace(
    opener: &mut Opener<'_>,
    rules: &[Rule],
    options: &RestoreOptions,
) -> Result<Vec<String>> {
    let outcome = opener.replace_addresses(rules);
    // Connections that come back closed come back without addresses.
    let closed = |c: &Change| options.tcp.close && c.protocol == TCP && c.peer.is_some();
    let alive: Vec<&Change> = outcome.changes.iter().filter(|c| !closed(c)).collect();
    let bound = alive.iter().filter(|c| !c.freebind && c.local.0.ip() != c.local.1.ip());
    let mut new: Vec<IpAddr> = bound.map(|c| c.local.1.ip()).collect();
    new.sort_unstable();
    new.dedup();
    // What a network namespace of its own has is seen when the socket is bound there.
    let missing = new.iter().find(|ip| !options.copy_netns && !host::is_local(**ip));
    if let Some(ip) = missing {
        return Err(Error::new(format!("--replace-address: {ip} is not an address of this host"))
            .hint(format!(
                "add it to an interface, or take one that this host has: {}",
                host::list()
            )));
    }
    let unused = rules.iter().zip(&outcome.matches).filter(|(_, matches)| **matches == 0);
    let unused = unused
        .map(|(rule, _)| format!("--replace-address {rule}: no socket of the images matches it"));
    Ok(unused.chain(alive.iter().filter_map(|c| c.advice())).collect())
}

/// Refuses copies that would take each other's addresses; `a` and `b` are openers of the first two.
///
/// # Errors
/// Two copies would be bound to the same address.
pub fn refuse_conflicts(a: &mut Opener<'_>, b: &mut Opener<'_>, rules: &[Vec<Rule>]) -> Result<()> {
    let [first, second, ..] = rules else { return Ok(()) };
    a.replace_addresses(first);
    b.replace_addresses(second);
    let (a, b) = (a.exclusive_addresses(), b.exclusive_addresses());
    let mut common: Vec<_> = a.intersection(&b).collect();
    common.sort_unstable();
    let Some((protocol, address)) = common.first() else { return Ok(()) };
    let protocol = if *protocol == TCP { "TCP" } else { "UDP" };
    let port = address.port();
    Err(Error::new(format!("all copies would have the {protocol} address {address}")).hint(format!(
        "give each its own, as by --replace-address ':{port}=:{{{port}+i}}', or a network of its own with --copy-netns"
    )))
}
