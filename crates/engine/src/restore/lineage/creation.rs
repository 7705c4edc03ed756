//! The way that explains every tree, where the quick one does not: sessions that are led by nobody any more and have
//! members under several parents, zombies that lead sessions, whatever fork, setsid, exit and subreapers can bring about.
//!
//! Everybody is cloned by somebody who is in the right session at that moment, and below whoever is to be its parent, if
//! need be by a helper that then exits: a process falls to the nearest subreaper above it, and only one is a subreaper at
//! a time. First all are cloned, sessions first where they were made first; then all join their groups; then, from the
//! leaves up, helpers exit and zombies die.
//!
//! What has to be found out for that is in which session each leader was born. Then *above* is settled: a process is made
//! somewhere above its children, and above the leader of every session that has them and not itself. If nobody is to be
//! above himself, the tree can be made.

use super::{Action, Lineage, Member, Node, Role};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// How many guesses where leaders were born are looked into.
const GUESSES: usize = 200_000;

/// Somebody who is born in a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Who {
    /// A member, by index.
    Member(usize),
    /// The helper that stands in for the leader of this session.
    Leader(i32),
}

/// In which session the leader of each session was born; not of the root's.
type Births = BTreeMap<i32, i32>;

/// Who is born in a session, each with those (of the same session) below whom it must be made.
type Order = BTreeMap<Who, BTreeSet<Who>>;

struct Explainer<'a> {
    members: &'a [Member],
    index: HashMap<i32, usize>,
    /// The root's session.
    top: i32,
    guesses: usize,
}

/// Plans the creation of `members`, the root first; with `init` below an init of their own. `None` if no way is found.
pub(super) fn explain(members: &[Member], init: bool) -> Option<Lineage> {
    let index = members.iter().enumerate().map(|(i, m)| (m.pid, i)).collect();
    let top = members.first()?.sid;
    let mut explainer = Explainer { members, index, top, guesses: 0 };
    let orders = explainer.find()?;
    Some(Maker::new(&explainer, init).make(&orders))
}

impl Explainer<'_> {
    fn parent(&self, i: usize) -> Option<usize> {
        self.index.get(&self.members[i].ppid).copied().filter(|_| i != 0)
    }

    fn leads(&self, i: usize) -> bool {
        self.members[i].sid == self.members[i].pid
    }

    /// Who leads a session: a member, or nobody who is left.
    fn leader(&self, session: i32) -> Who {
        match self.index.get(&session) {
            Some(i) if self.leads(*i) => Who::Member(*i),
            _ => Who::Leader(session),
        }
    }

    /// Looks for the sessions in which leaders were born: first where it would be most natural, then with more and more of
    /// those that are in question born elsewhere.
    fn find(&mut self) -> Option<BTreeMap<i32, Order>> {
        let mut births = Births::new();
        let mut odd = BTreeSet::new();
        for (i, m) in self.members.iter().enumerate() {
            let Some(parent) = self.parent(i).map(|p| self.members[p]) else { continue };
            if self.leads(i) {
                births.insert(m.sid, parent.sid);
            } else if parent.sid != m.sid {
                births.entry(m.sid).or_insert(parent.sid);
                odd.extend([m.sid, parent.sid]);
            }
        }
        births.remove(&self.top);
        self.expect_early(&mut births);
        let odd: Vec<i32> = births.keys().copied().filter(|s| odd.contains(s)).collect();
        let others: Vec<i32> = births.keys().copied().filter(|s| !odd.contains(s)).collect();
        // Those in question first: they are the first to be born elsewhere.
        let all: Vec<i32> = odd.into_iter().chain(others).collect();
        (0..=all.len()).find_map(|elsewhere| self.guess(&mut births, &all, elsewhere))
    }

    /// A leader whose child is in a session of somebody above was most likely born there: it had the child first.
    fn expect_early(&self, births: &mut Births) {
        // Children come after parents, so what a child needs is known before its parent is looked at.
        let mut early = BTreeSet::new();
        for i in (1..self.members.len()).rev() {
            let m = self.members[i];
            let Some(p) = self.parent(i).filter(|p| self.leads(*p) && *p != 0) else { continue };
            let need = match self.leads(i) {
                false => m.sid,
                true if early.contains(&i) => births[&m.sid],
                true => continue,
            };
            let mut above = std::iter::successors(self.parent(p), |p| self.parent(*p));
            if need != self.members[p].sid && above.any(|a| self.members[a].sid == need) {
                births.insert(self.members[p].sid, need);
                early.insert(p);
            }
        }
    }

    /// Tries all births that differ in exactly so many.
    fn guess(
        &mut self,
        births: &mut Births,
        open: &[i32],
        elsewhere: usize,
    ) -> Option<BTreeMap<i32, Order>> {
        if elsewhere == 0 {
            self.guesses += 1;
            return self.orders(births);
        }
        for (n, session) in open.iter().enumerate() {
            let usual = births.get(session).copied()?;
            let places: Vec<i32> = births.keys().copied().chain([self.top]).collect();
            for place in places.into_iter().filter(|p| *p != usual && p != session) {
                if self.guesses > GUESSES {
                    return None;
                }
                births.insert(*session, place);
                let found = self.guess(births, &open[n + 1..], elsewhere - 1);
                if found.is_some() {
                    return found;
                }
            }
            births.insert(*session, usual);
        }
        None
    }

    /// What these births mean for each session, the outer ones first in time; `None` if it is impossible.
    fn orders(&self, births: &Births) -> Option<BTreeMap<i32, Order>> {
        let mut orders: BTreeMap<i32, Order> = BTreeMap::from([(self.top, Order::new())]);
        orders.extend(births.keys().map(|s| (*s, Order::new())));
        for (i, m) in self.members.iter().enumerate().skip(1) {
            let born = if self.leads(i) { *births.get(&m.sid)? } else { m.sid };
            self.put_below(births, &mut orders, born, Who::Member(i), self.parent(i))?;
        }
        for (session, born) in births {
            if let stand_in @ Who::Leader(_) = self.leader(*session) {
                self.put_below(births, &mut orders, *born, stand_in, None)?;
            }
        }
        orders.values().all(|order| sorted(order).is_some()).then_some(orders)
    }

    /// Has `who`, born in `session`, made below `above`: in that session, or else its leader is.
    fn put_below(
        &self,
        births: &Births,
        orders: &mut BTreeMap<i32, Order>,
        session: i32,
        who: Who,
        above: Option<usize>,
    ) -> Option<()> {
        orders.get_mut(&session)?.entry(who).or_default();
        let Some(above) = above else { return self.leads_to_top(births, session) };
        let (mut session, mut who) = (session, who);
        for _ in 0..=births.len() {
            let m = self.members[above];
            let leads = self.leads(above);
            if m.sid == session && (leads || above == 0) {
                return self.leads_to_top(births, session);
            }
            let born = if leads { births.get(&m.sid).copied() } else { Some(m.sid) };
            if born == Some(session) {
                orders.get_mut(&session)?.entry(who).or_default().insert(Who::Member(above));
                return self.leads_to_top(births, session);
            }
            // The leader of the session, in the one that it was born in.
            (who, session) = (self.leader(session), *births.get(&session)?);
        }
        None
    }

    /// Are leaders born in sessions, and these led by who was born in sessions, up to the root's?
    fn leads_to_top(&self, births: &Births, mut session: i32) -> Option<()> {
        for _ in 0..=births.len() {
            if session == self.top {
                return Some(());
            }
            session = *births.get(&session)?;
        }
        None
    }
}

/// Those of a session, each after all below whom it is to be made; `None` if somebody would be below himself.
fn sorted(order: &Order) -> Option<Vec<Who>> {
    let mut done = BTreeSet::new();
    let mut sorted = Vec::with_capacity(order.len());
    while sorted.len() < order.len() {
        let before = sorted.len();
        for (who, above) in order {
            if !done.contains(who) && above.iter().all(|a| done.contains(a)) {
                done.insert(*who);
                sorted.push(*who);
            }
        }
        if sorted.len() == before {
            return None;
        }
    }
    Some(sorted)
}

/// Who clones whom within a session (nobody: its leader does). Where someone has to be below two who are not below each
/// other, all are made below each other, in a row.
fn forkers(order: &Order) -> Vec<(Who, Option<Who>)> {
    let all = sorted(order).unwrap_or_default();
    let mut chosen: BTreeMap<Who, Option<Who>> = BTreeMap::new();
    for who in &all {
        let above = &order[who];
        let line = |of: Who| {
            let mut line = vec![of];
            while let Some(Some(next)) = line.last().and_then(|last| chosen.get(last)) {
                line.push(*next);
            }
            line
        };
        let fits = |a: &&Who| {
            let line = line(**a);
            above.iter().all(|other| line.contains(other))
        };
        let lowest = above.iter().find(fits).copied();
        if lowest.is_none() && !above.is_empty() {
            let before = [None].into_iter().chain(all.iter().copied().map(Some));
            return all.iter().copied().zip(before).collect();
        }
        chosen.insert(*who, lowest);
    }
    all.iter().map(|who| (*who, chosen[who])).collect()
}

struct Maker<'a> {
    explainer: &'a Explainer<'a>,
    lineage: Lineage,
    nodes: HashMap<Who, usize>,
    /// Who was cloned by whom in the end, helpers that exit left out.
    below: Vec<Vec<usize>>,
}

impl<'a> Maker<'a> {
    fn new(explainer: &'a Explainer<'a>, init: bool) -> Maker<'a> {
        let mut maker = Maker {
            explainer,
            lineage: Lineage::default(),
            nodes: HashMap::new(),
            below: Vec::new(),
        };
        let root = explainer.members[0];
        let init = init.then(|| maker.push(Role::Init, Some(1), None));
        let node = maker.push(Role::Task(0), Some(root.pid), init);
        maker.nodes.insert(Who::Member(0), node);
        if let Some(init) = init {
            if root.sid == root.pid {
                maker.act(init, Action::Session);
            }
            maker.act(init, Action::Clone(node));
        }
        if root.sid == root.pid {
            maker.act(node, Action::Session);
        }
        maker
    }

    fn push(&mut self, role: Role, pid: Option<i32>, cloner: Option<usize>) -> usize {
        self.lineage.nodes.push(Node { cloner, ..Node::new(role, pid) });
        self.below.push(Vec::new());
        self.lineage.nodes.len() - 1
    }

    fn act(&mut self, node: usize, action: Action) {
        self.lineage.sequence.push((node, action));
    }

    fn clone(&mut self, cloner: usize, role: Role, pid: Option<i32>) -> usize {
        let node = self.push(role, pid, Some(cloner));
        self.act(cloner, Action::Clone(node));
        node
    }

    fn make(mut self, orders: &BTreeMap<i32, Order>) -> Lineage {
        self.session(self.explainer.top, self.nodes[&Who::Member(0)], orders);
        self.groups();
        self.settle(self.nodes[&Who::Member(0)]);
        self.lineage
    }

    /// Clones all who are born in a session, then makes the sessions that they lead. `top` leads it.
    fn session(&mut self, session: i32, top: usize, orders: &BTreeMap<i32, Order>) {
        let Some(order) = orders.get(&session) else { return };
        let forkers = forkers(order);
        for (who, forker) in &forkers {
            let forker = forker.map_or(top, |f| self.nodes[&f]);
            let node = match *who {
                Who::Leader(sid) => self.clone(forker, Role::Leader, super::seen(sid)),
                Who::Member(i) => {
                    let parent = self.explainer.parent(i);
                    let direct = parent.map(Role::Task) == Some(self.lineage.nodes[forker].role);
                    let cloner = match direct {
                        true => forker,
                        false => self.clone(forker, Role::Orphaner, None),
                    };
                    self.clone(cloner, Role::Task(i), Some(self.explainer.members[i].pid))
                }
            };
            self.below[forker].push(node);
            self.nodes.insert(*who, node);
        }
        for (who, _) in &forkers {
            let leads = match *who {
                Who::Leader(sid) => Some(sid),
                Who::Member(i) => {
                    Some(self.explainer.members[i].pid).filter(|_| self.explainer.leads(i))
                }
            };
            if let Some(sid) = leads {
                let node = self.nodes[who];
                self.act(node, Action::Session);
                self.session(sid, node, orders);
            }
        }
    }

    /// All are in their sessions, in the groups of their leaders: now each goes to its own.
    fn groups(&mut self) {
        let members = self.explainer.members;
        let root = members[0];
        let own = |m: &Member| m.pgid == m.pid;
        let outside = root.pgid;
        let job = |m: &Member| {
            let led = self.explainer.index.contains_key(&outside);
            m.pgid == outside && outside != root.pid && !led
        };
        let leaves = |m: &&(usize, &Member)| {
            let born = m.1.pgid == m.1.sid && (m.1.sid != root.sid || root.sid == root.pid);
            m.1.pgid != 0 && !own(m.1) && !born && !job(m.1)
        };
        let all: Vec<(usize, &Member)> = members.iter().enumerate().collect();
        let joiners: Vec<(usize, &Member)> = all.iter().filter(leaves).copied().collect();
        for (i, _) in all.iter().filter(|(_, m)| own(m) && m.sid != m.pid) {
            self.act(self.nodes[&Who::Member(*i)], Action::Group);
        }
        let mut held = BTreeSet::new();
        let mut helpers = Vec::new();
        let mut back = Vec::new();
        for (i, m) in &joiners {
            let leader = self.explainer.index.get(&m.pgid).copied();
            if leader.is_some_and(|l| own(&members[l])) || !held.insert(m.pgid) {
                continue;
            }
            let helper = match leader {
                // It has made the group and gone to another, but cannot be the last to leave.
                Some(leader) => {
                    let group = if job(&members[leader]) { 0 } else { members[leader].pgid };
                    let leader = self.nodes[&Who::Member(leader)];
                    back.push((leader, group));
                    self.act(leader, Action::Group);
                    self.clone(leader, Role::Orphaner, None)
                }
                None => {
                    let node = self.nodes[&Who::Member(*i)];
                    let helper = self.clone(node, Role::Group, Some(m.pgid));
                    self.act(helper, Action::Group);
                    helper
                }
            };
            helpers.push(helper);
        }
        for (i, m) in joiners {
            self.act(self.nodes[&Who::Member(i)], Action::Join(m.pgid));
        }
        for (leader, group) in back {
            self.act(leader, Action::Join(group));
        }
        for helper in helpers {
            self.end(helper);
        }
    }

    /// A helper exits.
    fn end(&mut self, helper: usize) {
        self.act(helper, Action::Exit);
        if let Some(cloner) = self.lineage.nodes[helper].cloner {
            self.act(cloner, Action::Reap);
        }
    }

    /// From the leaves up, everybody comes to its parent, and whoever is dead dies. Those above are where they were made
    /// until then.
    fn settle(&mut self, node: usize) {
        for below in std::mem::take(&mut self.below[node]) {
            self.settle(below);
        }
        let Role::Task(i) = self.lineage.nodes[node].role else {
            return self.end(node);
        };
        let parent =
            self.explainer.parent(i).and_then(|p| self.nodes.get(&Who::Member(p)).copied());
        let cloner = self.lineage.nodes[node].cloner;
        if let Some(helper) = cloner.filter(|c| self.lineage.nodes[*c].role == Role::Orphaner)
            && let Some(parent) = parent
        {
            self.act(parent, Action::Reaper(true));
            self.act(node, Action::Fall);
            if let Some(cloner) = self.lineage.nodes[helper].cloner {
                self.act(cloner, Action::Reap);
            }
            self.act(parent, Action::Reaper(false));
        }
        let m = self.explainer.members[i];
        if m.zombie {
            self.act(node, Action::Die);
            if let Some(parent) = parent {
                self.act(parent, Action::Await(m.pid));
            }
        }
    }
}
