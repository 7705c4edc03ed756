//! Rules: `OLD=NEW`, where both sides are an address, a prefix, a port, or an address (prefix) and a port.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Why a text is no rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{text}': {reason}")]
pub struct BadRule {
    /// The rule as it was given.
    pub text: String,
    /// What is wrong with it.
    pub reason: String,
}

/// One side of a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Side {
    /// Address and length of the prefix; a whole address is a prefix of all its bits. IPv4 addresses mapped into IPv6 are
    /// IPv4 addresses.
    network: Option<(IpAddr, u8)>,
    port: Option<u16>,
}

/// `OLD=NEW`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    text: String,
    old: Side,
    new: Side,
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Bits of an address of this family.
fn bits(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

/// The address as a number, its first bit highest.
fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u128::from(v4.to_bits()) << 96,
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

/// The bits of a prefix of this length, in a number as of [`number`].
fn mask(len: u8) -> u128 {
    u128::MAX.checked_shl(128 - u32::from(len)).unwrap_or(0)
}

/// The address of the number, of the same family as `like`.
fn address(number: u128, like: IpAddr) -> IpAddr {
    match like {
        IpAddr::V4(_) => Ipv4Addr::from_bits((number >> 96) as u32).into(),
        IpAddr::V6(_) => Ipv6Addr::from_bits(number).into(),
    }
}

impl Side {
    fn parse(text: &str) -> Result<Side, String> {
        if text.is_empty() {
            return Err("OLD and NEW must be given".into());
        }
        // `:80` is a port, `::80` an address.
        if let Some(port) = text.strip_prefix(':').filter(|p| p.bytes().all(|b| b.is_ascii_digit()))
        {
            return Ok(Side { network: None, port: Some(parse_port(port)?) });
        }
        let (network, port) = if let Some(rest) = text.strip_prefix('[') {
            let (inside, after) =
                rest.split_once(']').ok_or_else(|| format!("'{text}' has no closing bracket"))?;
            match (after, after.strip_prefix(':')) {
                ("", _) => (inside, None),
                (_, Some(port)) => (inside, Some(port)),
                _ => return Err(format!("'{after}' behind the bracket is no port")),
            }
        } else if text.matches(':').count() == 1 {
            text.split_once(':').map_or((text, None), |(a, p)| (a, Some(p)))
        } else {
            (text, None)
        };
        Ok(Side { network: Some(parse_network(network)?), port: port.map(parse_port).transpose()? })
    }
}

fn parse_port(text: &str) -> Result<u16, String> {
    match text.parse::<u16>() {
        Ok(port) if port != 0 => Ok(port),
        _ => Err(format!("'{text}' is no port (1 to 65535)")),
    }
}

fn parse_network(text: &str) -> Result<(IpAddr, u8), String> {
    let (base, len) = text.split_once('/').map_or((text, None), |(a, l)| (a, Some(l)));
    let base: IpAddr = base.parse().map_err(|_| format!("'{base}' is no IP address"))?;
    let all = bits(base);
    let len = match len {
        None => all,
        Some(len) => len
            .parse::<u8>()
            .ok()
            .filter(|l| *l <= all)
            .ok_or_else(|| format!("'{len}' is no length of a prefix of {base}"))?,
    };
    if number(base) & !mask(len) != 0 {
        let network = address(number(base) & mask(len), base);
        return Err(format!("{base}/{len} is no prefix: that would be {network}/{len}"));
    }
    // ::ffff:10.0.0.1 is how an IPv6 socket calls 10.0.0.1.
    const MAPPED: u8 = 96;
    Ok(match base.to_canonical() {
        IpAddr::V4(v4) if base.is_ipv6() && len >= MAPPED => (v4.into(), len - MAPPED),
        canonical if canonical.is_ipv4() == base.is_ipv4() => (base, len),
        _ => return Err(format!("{base}/{len} is a prefix of all IPv4 addresses and more")),
    })
}

impl Rule {
    /// Parses `OLD=NEW`.
    ///
    /// # Errors
    /// A side makes no sense, or they are not of the same kind.
    pub fn parse(text: &str) -> Result<Rule, BadRule> {
        let bad = |reason: String| BadRule { text: text.to_owned(), reason };
        let (old, new) = text.split_once('=').ok_or_else(|| bad("it is not OLD=NEW".into()))?;
        let (old, new) = (Side::parse(old).map_err(bad)?, Side::parse(new).map_err(bad)?);
        match (old.network, new.network) {
            (Some((o, _)), Some((n, _))) if o.is_ipv4() != n.is_ipv4() => {
                return Err(bad("one side is IPv4, the other IPv6".into()));
            }
            (Some((_, o)), Some((_, n))) if o != n => {
                return Err(bad("the prefixes are not of the same length".into()));
            }
            (Some(_), None) | (None, Some(_)) => {
                return Err(bad("one side has an address, the other has none".into()));
            }
            _ => {}
        }
        if old.port.is_some() != new.port.is_some() {
            return Err(bad("one side has a port, the other has none".into()));
        }
        Ok(Rule { text: text.to_owned(), old, new })
    }

    /// Does it change ports, whatever the address?
    #[must_use]
    pub fn is_port_only(&self) -> bool {
        self.old.network.is_none()
    }

    /// Does it look at ports?
    #[must_use]
    pub fn has_port(&self) -> bool {
        self.old.port.is_some()
    }

    /// What becomes of an address and a port; `None` if the rule is not about them.
    ///
    /// IPv4 addresses mapped into IPv6 match as what they are, and stay mapped. A prefix does not match loopback addresses
    /// or the wildcard, unless it is one of loopback addresses.
    #[must_use]
    pub fn apply(&self, ip: IpAddr, port: u16) -> Option<(IpAddr, u16)> {
        if self.old.port.is_some_and(|p| p != port) {
            return None;
        }
        let new_port = self.new.port.unwrap_or(port);
        let (Some((old, len)), Some((new, _))) = (self.old.network, self.new.network) else {
            return Some((ip, new_port));
        };
        let plain = ip.to_canonical();
        if plain.is_ipv4() != old.is_ipv4() || (number(plain) ^ number(old)) & mask(len) != 0 {
            return None;
        }
        let named = len == bits(old) || old.is_loopback();
        if !named && (plain.is_loopback() || plain.is_unspecified()) {
            return None;
        }
        let moved = address(number(new) & mask(len) | number(plain) & !mask(len), plain);
        let moved = match (ip, moved) {
            (IpAddr::V6(_), IpAddr::V4(v4)) => v4.to_ipv6_mapped().into(),
            _ => moved,
        };
        Some((moved, new_port))
    }
}

/// A rule of which each of several copies gets its own: `:8080=:{8080+i}`, `10.0.0.1=10.0.0.{1+i}`. `i` is the number of
/// the copy, from 0; between braces stands a sum or difference of numbers and products with `i`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template(String);

impl Template {
    /// Takes a text; whether it is a rule is seen when it is [filled in](Template::rule).
    #[must_use]
    pub fn new(text: impl Into<String>) -> Template {
        Template(text.into())
    }

    /// Is it the same rule for every copy?
    #[must_use]
    pub fn is_constant(&self) -> bool {
        !self.0.contains('{')
    }

    /// The rule of copy `i`.
    ///
    /// # Errors
    /// It makes no sense for this copy.
    pub fn rule(&self, i: u32) -> Result<Rule, BadRule> {
        let bad = |reason: String| BadRule { text: self.0.clone(), reason };
        let mut filled = String::new();
        let mut rest = self.0.as_str();
        while let Some((before, after)) = rest.split_once('{') {
            let (inside, after) =
                after.split_once('}').ok_or_else(|| bad("a brace is not closed".into()))?;
            let value = evaluate(inside, i.into())
                .ok_or_else(|| bad(format!("{{{inside}}} is not like {{8080+i}}")))?;
            filled.push_str(before);
            filled.push_str(&value.to_string());
            rest = after;
        }
        filled.push_str(rest);
        Rule::parse(&filled).map_err(|e| match self.is_constant() {
            true => e,
            false => bad(format!("for copy {i}: {}", e.reason)),
        })
    }
}

impl fmt::Display for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The value of a sum such as `8080+i*2`; `None` if it is none, or negative.
fn evaluate(text: &str, i: u64) -> Option<u64> {
    let mut sum = 0i128;
    let mut rest = text;
    let mut sign = 1i128;
    loop {
        let end = rest.find(['+', '-']).unwrap_or(rest.len());
        let product = rest[..end].split('*').try_fold(1i128, |product, factor| {
            let factor = match factor.trim() {
                "i" => i128::from(i),
                digits => i128::from(digits.parse::<u32>().ok()?),
            };
            product.checked_mul(factor)
        })?;
        sum = sum.checked_add(sign.checked_mul(product)?)?;
        match rest[end..].chars().next() {
            None => return u64::try_from(sum).ok(),
            Some(operator) => sign = if operator == '-' { -1 } else { 1 },
        }
        rest = &rest[end + 1..];
    }
}
