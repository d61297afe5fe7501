//! Opening, closing and modifying channels
//! (docs/spec/vmbus.md#vmbus-5).
#![forbid(unsafe_code)]

use super::*;

/// Pages that a ring has at least: its control page and one of data.
const MIN_RING_PAGES: usize = 2;

impl Server {
    pub(super) fn open_channel(&mut self, request: &guest::OpenChannel) -> Result<(), Drop> {
        let (id, _, channel) = self.find(request.relid)?;
        let params = OpenParams {
            open_id: request.open_id,
            gpadl: request.ring_gpadl,
            target_vp: request.target_vp,
            downstream_page: request.downstream_page,
        };
        match channel.phase {
            Phase::Offered => self.start_open(id, params),
            Phase::Closing(old, AfterClose::Offer) => {
                self.set_phase(id, Phase::Closing(old, AfterClose::Reopen(params)));
            }
            Phase::Rescinded => return Err(Drop::Rescinded),
            _ => return Err(Drop::WrongState),
        }
        Ok(())
    }

    /// Opens an offered channel, or answers that it cannot be opened.
    fn start_open(&mut self, id: ChannelId, params: OpenParams) {
        if (self.is_target(params.target_vp) || mutant!("open-missing-vp"))
            && self.unclaimed_rings(id, &params).is_some()
        {
            self.set_phase(id, Phase::Opening(params));
            self.actions.push_back(Action::Open(id));
        } else {
            self.set_phase(id, Phase::Offered);
            self.open_answer(id, params.open_id, false);
        }
    }

    /// The pages of both rings, if the GPADL can hold them and the guest does not want it back.
    fn unclaimed_rings(&self, id: ChannelId, params: &OpenParams) -> Option<(Vec<u64>, Vec<u64>)> {
        let relid = self.channels.get(&id)?.relid?;
        let claimed = self.gpadls.get(relid, params.gpadl)?.teardown_pending;
        self.rings_of(id, params).filter(|_| !claimed)
    }

    /// The pages of both rings, if the GPADL can hold them.
    pub(super) fn rings_of(
        &self,
        id: ChannelId,
        params: &OpenParams,
    ) -> Option<(Vec<u64>, Vec<u64>)> {
        let relid = self.channels.get(&id)?.relid?;
        let mut to_host = self.gpadls.get(relid, params.gpadl)?.ring_pages()?;
        let split = usize::try_from(params.downstream_page).ok()?;
        let rest = to_host.len().checked_sub(split)?;
        if split < MIN_RING_PAGES || rest < MIN_RING_PAGES {
            return None;
        }
        let to_guest = to_host.split_off(split);
        Some((to_host, to_guest))
    }

    /// What [`Action::Open`] opens; none if it is no longer wanted.
    pub fn ring_pages(&self, id: ChannelId) -> Option<RingPages> {
        let channel = self.channels.get(&id)?;
        let Phase::Opening(params) = channel.phase else {
            return None;
        };
        let rings = self.unclaimed_rings(id, &params)?;
        Some(Self::pages(channel.relid?, &params, rings))
    }

    /// The rings of a channel that is open, for going on with a saved one.
    pub(crate) fn open_rings(&self, id: ChannelId) -> Option<RingPages> {
        let channel = self.channels.get(&id)?;
        let Phase::Open(params) = channel.phase else {
            return None;
        };
        let rings = self.rings_of(id, &params)?;
        Some(Self::pages(channel.relid?, &params, rings))
    }

    fn pages(relid: u16, params: &OpenParams, rings: (Vec<u64>, Vec<u64>)) -> RingPages {
        let (to_host, to_guest) = rings;
        RingPages {
            relid,
            sint: wire::SINT,
            target_vp: Some(params.target_vp).filter(|vp| *vp != wire::VP_NONE),
            to_host,
            to_guest,
        }
    }

    fn open_answer(&mut self, id: ChannelId, open_id: u32, ok: bool) {
        let Some(relid) = self.channels.get(&id).and_then(|channel| channel.relid) else {
            return;
        };
        if !ok {
            self.counters.opens_refused += 1;
        }
        let result = host::OpenChannelResult {
            relid: relid.into(),
            open_id,
            status: if ok {
                wire::STATUS_SUCCESS
            } else {
                wire::STATUS_FAILURE
            },
        };
        self.send(HostMessage::OpenChannelResult(result));
    }

    /// The outcome of [`Action::Open`].
    pub fn opened(&mut self, id: ChannelId, ok: bool) {
        let Some(channel) = self.channels.get(&id).copied() else {
            return;
        };
        let (Phase::Opening(params), Some(relid)) = (channel.phase, channel.relid) else {
            return;
        };
        let connected = matches!(self.connection, Connection::Connected(_));
        let wanted = connected && !channel.revoked;
        self.open_answer(id, params.open_id, ok && wanted);
        match (ok, wanted) {
            (true, true) => self.set_phase(id, Phase::Open(params)),
            (true, false) => self.start_close(id, params),
            (false, true) => {
                self.set_phase(id, Phase::Offered);
                self.settle_teardowns(relid, None);
            }
            (false, false) => self.closed_unwanted(id, connected),
        }
    }

    pub(super) fn close_channel(&mut self, relid: u32) -> Result<(), Drop> {
        let (id, _, channel) = self.find(relid)?;
        match channel.phase {
            Phase::Open(params) => self.start_close(id, params),
            Phase::Rescinded => return Err(Drop::Rescinded),
            _ => return Err(Drop::WrongState),
        }
        Ok(())
    }

    pub(super) fn start_close(&mut self, id: ChannelId, params: OpenParams) {
        self.set_phase(id, Phase::Closing(params, AfterClose::Offer));
        self.actions.push_back(Action::Close(id));
    }

    /// [`Action::Close`] is done: nothing of the device touches the rings any more.
    pub fn closed(&mut self, id: ChannelId) {
        let Some(channel) = self.channels.get(&id).copied() else {
            return;
        };
        let (Phase::Closing(_, after), Some(relid)) = (channel.phase, channel.relid) else {
            return;
        };
        let connected = matches!(self.connection, Connection::Connected(_));
        if !connected || after == AfterClose::Release {
            self.withdraw(id);
            self.finish_disconnect();
            return;
        }
        self.set_phase(id, Phase::Offered);
        match after {
            AfterClose::Reopen(params) if channel.revoked => {
                self.open_answer(id, params.open_id, false);
            }
            AfterClose::Reopen(params) => self.start_open(id, params),
            AfterClose::Offer | AfterClose::Release => {}
        }
        if channel.revoked {
            self.closed_unwanted(id, connected);
        } else {
            let in_use = self.channels.get(&id).and_then(Channel::ring_gpadl);
            self.settle_teardowns(relid, in_use);
        }
    }

    /// A channel is closed that the embedder took back or whose connection ends.
    fn closed_unwanted(&mut self, id: ChannelId, connected: bool) {
        if connected {
            self.rescind(id);
        } else {
            self.withdraw(id);
            self.finish_disconnect();
        }
    }

    pub(super) fn modify_channel(
        &mut self,
        contact: Contact,
        request: guest::ModifyChannel,
    ) -> Result<(), Drop> {
        if contact.version < Version::V4_1 {
            return Err(Drop::NotOffered);
        }
        let ok = self.retarget(&request);
        if !ok {
            self.counters.modifies_refused += 1;
        }
        if contact.version >= Version::V5_3 && !mutant!("modify-unanswered") {
            let response = host::ModifyChannelResponse {
                relid: request.relid,
                status: if ok {
                    wire::STATUS_SUCCESS
                } else {
                    wire::STATUS_FAILURE
                },
            };
            self.send(HostMessage::ModifyChannelResponse(response));
        }
        Ok(())
    }

    fn retarget(&mut self, request: &guest::ModifyChannel) -> bool {
        let Ok((id, _, channel)) = self.find(request.relid) else {
            return false;
        };
        let (Phase::Open(mut params), true) = (
            channel.phase,
            request.target_vp < self.vp_count || mutant!("modify-missing-vp"),
        ) else {
            return false;
        };
        params.target_vp = request.target_vp;
        self.set_phase(id, Phase::Open(params));
        self.actions
            .push_back(Action::Retarget(id, request.target_vp));
        true
    }
}
