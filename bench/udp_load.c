/* A UDP generator and its sink, for the rate a tunnel carries without loss. Not a general load tester.
 *
 *   udp_load sink PORT CONTROL-PORT
 *   udp_load send HOST PORT SINK-CONTROL-HOST CONTROL-PORT BYTES WINDOW SECONDS
 *
 * Closed loop: at most WINDOW datagrams of BYTES payload are on their way. The sink reports what has arrived
 * over a second socket, which the caller routes beside the tunnel, so only the one direction is measured. Each
 * datagram starts with its run and its number; a lost one is released when a later one is reported, and when
 * nothing comes for 50 ms the window is taken as lost. Both ends use sendmmsg and recvmmsg, and 8 MB buffers,
 * so that they themselves are not what limits or loses.
 *
 * `send` prints one JSON object: sent, received (by the sink), seconds. `sink` serves one run after another.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { BURST = 32, SLOT_BYTES = 2048, BUFFER_BYTES = 8 << 20, LOSS_TIMEOUT_MS = 50, DRAIN_TIMEOUT_MS = 200 };

struct head { uint32_t run, window; uint64_t number; };         /* starts each datagram; number counts from 1 */
struct report { uint32_t run, unused; uint64_t highest, count; }; /* from the sink */

static void die(const char *what) { perror(what); exit(1); }

static uint64_t now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static struct sockaddr_in address(const char *host, const char *port)
{
	struct sockaddr_in a = { .sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(port)) };
	if (inet_pton(AF_INET, host, &a.sin_addr) != 1) { fprintf(stderr, "no IPv4 address: %s\n", host); exit(2); }
	return a;
}

static int udp_socket(void)
{
	int s = socket(AF_INET, SOCK_DGRAM, 0), bytes = BUFFER_BYTES;
	if (s < 0) die("socket");
	if (setsockopt(s, SOL_SOCKET, SO_RCVBUFFORCE, &bytes, sizeof bytes)) die("SO_RCVBUFFORCE");
	if (setsockopt(s, SOL_SOCKET, SO_SNDBUFFORCE, &bytes, sizeof bytes)) die("SO_SNDBUFFORCE");
	return s;
}

static char slots[BURST][SLOT_BYTES];
static struct iovec vectors[BURST];
static struct mmsghdr messages[BURST];

static void prepare(size_t bytes)
{
	for (int i = 0; i < BURST; i++) {
		vectors[i] = (struct iovec){ slots[i], bytes };
		messages[i].msg_hdr = (struct msghdr){ .msg_iov = &vectors[i], .msg_iovlen = 1 };
	}
}

static _Noreturn void sink(char **argument)
{
	int data = udp_socket(), control = udp_socket();
	struct sockaddr_in here = address("0.0.0.0", argument[0]), from;
	struct report report = { 0 };
	uint64_t reported = 0;
	socklen_t from_length = sizeof from;
	char hello[8];

	if (bind(data, (struct sockaddr *)&here, sizeof here)) die("bind");
	here = address("0.0.0.0", argument[1]);
	if (bind(control, (struct sockaddr *)&here, sizeof here)) die("bind");
	prepare(SLOT_BYTES);
	puts("ready");
	fflush(stdout);
	if (recvfrom(control, hello, sizeof hello, 0, (struct sockaddr *)&from, &from_length) < 0) die("recvfrom");
	for (;;) {
		struct pollfd wait[2] = { { data, POLLIN, 0 }, { control, POLLIN, 0 } };
		int n = recvmmsg(data, messages, BURST, MSG_DONTWAIT, NULL);
		if (n < 0) {
			if (errno != EAGAIN) die("recvmmsg");
			if (report.count != reported) { /* the tail of a burst, which the next one may never follow */
				sendto(control, &report, sizeof report, 0, (struct sockaddr *)&from, from_length);
				reported = report.count;
			}
			if (poll(wait, 2, -1) < 0) die("poll");
			if (wait[1].revents) { /* a new sender, or one that asks again */
				recvfrom(control, hello, sizeof hello, 0, (struct sockaddr *)&from, &from_length);
				sendto(control, &report, sizeof report, 0, (struct sockaddr *)&from, from_length);
			}
			continue;
		}
		uint32_t window = 1;
		for (int i = 0; i < n; i++) {
			struct head *head = (struct head *)slots[i];
			if (messages[i].msg_len < sizeof *head) continue;
			if (head->run != report.run) { report = (struct report){ .run = head->run }; reported = 0; }
			if (head->number > report.highest) report.highest = head->number;
			window = head->window;
			report.count++;
		}
		if (report.count - reported >= window / 4) {
			sendto(control, &report, sizeof report, 0, (struct sockaddr *)&from, from_length);
			reported = report.count;
		}
	}
}

static int take_reports(int control, uint32_t run, struct report *latest, int timeout_ms)
{
	struct pollfd wait = { control, POLLIN, 0 };
	struct report report;
	int taken = 0;
	if (timeout_ms && poll(&wait, 1, timeout_ms) <= 0) return 0;
	while (recv(control, &report, sizeof report, MSG_DONTWAIT) == (ssize_t)sizeof report) {
		if (report.run != run || report.count < latest->count) continue;
		*latest = report;
		taken = 1;
	}
	return taken;
}

static int sender(char **argument)
{
	int data = udp_socket(), control = udp_socket();
	struct sockaddr_in to = address(argument[0], argument[1]), reports = address(argument[2], argument[3]);
	size_t bytes = (size_t)atoi(argument[4]);
	uint64_t window = (uint64_t)atoi(argument[5]), sent = 0, released = 0;
	uint32_t run = (uint32_t)now_ns();
	struct report latest = { 0 };
	uint64_t begin, end;

	if (bytes < sizeof(struct head) || bytes > SLOT_BYTES || window < 1) { fputs("bad size or window\n", stderr); return 2; }
	if (connect(data, (struct sockaddr *)&to, sizeof to)) die("connect");
	if (connect(control, (struct sockaddr *)&reports, sizeof reports)) die("connect");
	if (send(control, "hello", 5, 0) < 0) die("send");
	prepare(bytes);
	begin = now_ns();
	end = begin + (uint64_t)(atof(argument[6]) * 1e9);
	while (now_ns() < end) {
		uint64_t room;
		take_reports(control, run, &latest, 0);
		if (latest.highest > released) released = latest.highest;
		room = window - (sent - released);
		if (room == 0) {
			if (!take_reports(control, run, &latest, LOSS_TIMEOUT_MS)) released = sent;
			continue;
		}
		int burst = (int)(room < BURST ? room : BURST), done;
		for (int i = 0; i < burst; i++)
			*(struct head *)slots[i] = (struct head){ run, (uint32_t)window, sent + (uint64_t)i + 1 };
		done = sendmmsg(data, messages, (unsigned)burst, 0);
		if (done < 0) {
			if (errno == ENOBUFS || errno == EAGAIN || errno == ECONNREFUSED) continue;
			die("sendmmsg");
		}
		sent += (uint64_t)done;
	}
	end = now_ns();
	for (int quiet = 0; latest.count < sent && quiet < 2;) { /* the last ones may still be on their way */
		if (take_reports(control, run, &latest, DRAIN_TIMEOUT_MS)) continue;
		quiet++;
		if (send(control, "again", 5, 0) < 0) die("send");
	}
	printf("{\"sent\": %llu, \"received\": %llu, \"seconds\": %.6f}\n", (unsigned long long)sent,
	       (unsigned long long)latest.count, (double)(end - begin) / 1e9);
	return 0;
}

int main(int count, char **argument)
{
	if (count == 4 && !strcmp(argument[1], "sink")) sink(argument + 2);
	if (count == 9 && !strcmp(argument[1], "send")) return sender(argument + 2);
	fputs("usage: udp_load sink PORT CONTROL | udp_load send HOST PORT HOST CONTROL BYTES WINDOW SECONDS\n", stderr);
	return 2;
}
