"""A swarm of phones in virtual time: the production engine over links with queues, payloads as sizes only."""
